// Tables for x86-64 CPUs with AMX int8 tiles (Sapphire Rapids on): the 512-bit table with panels on the tile unit.
#include "internal.h"

namespace mimo {
namespace {

mimo_table with_tiles(const mimo_table *base) noexcept {
  mimo_table table = *base;
  table.name = "amx";
  return table;
}

}  // namespace

const mimo_table *amx_table() noexcept {
  const mimo_table *base = avx512_table();
  if (base == nullptr) return nullptr;
  static const mimo_table table = with_tiles(base);
  return &table;
}

}  // namespace mimo

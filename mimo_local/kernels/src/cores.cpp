// How many threads this process should use and where they belong: affinity mask, cores, cgroup quota. Baseline code.
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "internal.h"

namespace mimo {
namespace {

std::string first_line(const std::string &path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs a quota of `quota` microseconds every `period` amounts to; 0 means no limit.
int quota_cpus(double quota, double period) noexcept {
  if (!(quota > 0.0) || !(period > 0.0)) return 0;
  return std::max(1, static_cast<int>(std::min(quota / period, 65536.0)));
}

int quota_in(const std::string &folder, bool unified) {
  double quota = 0.0;
  double period = 0.0;
  if (unified) {  // "max 100000" or "150000 100000"
    std::istringstream(first_line(folder + "/cpu.max")) >> quota >> period;
  } else {  // -1 or microseconds
    std::istringstream(first_line(folder + "/cpu.cfs_quota_us")) >> quota;
    std::istringstream(first_line(folder + "/cpu.cfs_period_us")) >> period;
  }
  return quota_cpus(quota, period);
}

// The tightest quota of a group and its ancestors up to the mount point. Inside a container the path may name a group
// of the host that is not visible here; the mount point itself is then the container's own group.
int tightest(const std::string &mount, std::string group, bool unified) {
  int least = quota_in(mount, unified);
  while (group.size() > 1) {
    const int here = quota_in(mount + group, unified);
    if (here > 0 && (least == 0 || here < least)) least = here;
    group.resize(group.find_last_of('/'));
  }
  return least;
}

// CPUs of the affinity mask, in a set that holds machines of any size.
std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  for (int bits = 1024; bits <= 1 << 18; bits *= 2) {
    std::unique_ptr<cpu_set_t, void (*)(cpu_set_t *)> set(CPU_ALLOC(bits), [](cpu_set_t *s) { CPU_FREE(s); });
    const std::size_t size = CPU_ALLOC_SIZE(bits);
    if (set == nullptr || sched_getaffinity(0, size, set.get()) != 0) continue;
    for (int cpu = 0; cpu < bits; ++cpu) {
      if (CPU_ISSET_S(cpu, size, set.get())) cpus.push_back(cpu);
    }
    break;
  }
  return cpus;
}

// By CPU of the mask the first CPU of the mask on the same physical core: SMT siblings share the units these kernels
// keep busy.
std::vector<std::pair<int, int>> cores_of(const std::vector<int> &cpus) {
  std::map<std::pair<std::string, std::string>, int> seen;
  std::vector<std::pair<int, int>> found;
  for (const int cpu : cpus) {
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    std::string core = first_line(topology + "core_id");
    if (core.empty()) core = "cpu" + std::to_string(cpu);  // no sysfs: count every CPU
    const auto first = seen.emplace(std::pair(first_line(topology + "physical_package_id"), core), cpu).first;
    found.emplace_back(cpu, first->second);
  }
  return found;
}

std::vector<int> one_cpu_per_core(const std::vector<int> &cpus) {
  std::vector<int> first;
  for (const auto &[cpu, home] : cores_of(cpus)) {
    if (cpu == home) first.push_back(cpu);
  }
  return first;
}

}  // namespace

// The cgroup quota (v1 or v2) in whole CPUs, at least 1; 0 without a quota. `root` is put before every path.
int cgroup_cpu_limit(const char *root) noexcept {
  try {
    const std::string base = root;
    std::ifstream groups(base + "/proc/self/cgroup");
    int least = 0;
    for (std::string line; std::getline(groups, line);) {  // "4:cpu,cpuacct:/some/group", v2: "0::/some/group"
      const std::size_t first = line.find(':');
      const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
      if (second == std::string::npos) continue;
      const std::string controllers = line.substr(first + 1, second - first - 1);
      const std::string group = line.substr(second + 1);
      const bool unified = controllers.empty();
      if (!unified && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
      const std::string mount = base + "/sys/fs/cgroup" + (unified ? "" : "/" + controllers);
      const int limit = tightest(mount, group, unified);
      if (limit > 0 && (least == 0 || limit < least)) least = limit;
    }
    return least;
  } catch (...) {
    return 0;
  }
}

int usable_cores() noexcept {
  try {
    return std::max(1, static_cast<int>(one_cpu_per_core(allowed_cpus()).size()));
  } catch (...) {
    return 1;
  }
}

// Pinning is only fair where the process has the whole machine and uses all its cores: otherwise two processes would
// sit on the same few cores while others idle.
bool worker_homes(int threads, int *cpus, int *home_of, int n_cpus) {
  const std::vector<int> allowed = allowed_cpus();
  const std::vector<int> homes = one_cpu_per_core(allowed);
  const bool whole = static_cast<long>(allowed.size()) == sysconf(_SC_NPROCESSORS_ONLN) && cgroup_cpu_limit("") == 0;
  if (!whole || static_cast<int>(homes.size()) != threads) return false;
  std::copy(homes.begin(), homes.end(), cpus);
  for (const auto &[cpu, home] : cores_of(allowed)) {
    if (cpu < n_cpus) home_of[cpu] = home;
  }
  return true;
}

}  // namespace mimo

extern "C" {

int32_t mimo_default_threads(void) noexcept {
  const int cores = mimo::usable_cores();
  const int limit = mimo::cgroup_cpu_limit("");
  return std::min(mimo::kMostThreads, limit > 0 ? std::min(cores, limit) : cores);
}

}  // extern "C"

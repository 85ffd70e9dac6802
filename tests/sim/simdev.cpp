// A stand-in accelerator for tests: real numbers, and the mistakes that only show on a real device made visible.
//
//   * Device memory is protected (PROT_NONE) outside of the device's own operations: a host access dies with SIGSEGV.
//   * Copies with non_blocking are lazy. Their destination is poisoned with 0xFF (NaN) when they are queued; a copy to the
//     device happens when its stream is drained (an operation on that stream, a wait for it), one to the host is
//     delivered at a host synchronisation only. Who forgets to wait reads NaN, every time.
//   * An operation that gets tensors of two devices raises. Computation itself is immediate, on the CPU.
//
// Compiled by tests/sim_device.py against the installed torch; registered as device "sim" (PrivateUse1).
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

struct Block {
  size_t bytes;
};
struct Copy {
  std::function<void()> run;
};
struct Queue {
  std::deque<Copy> to_device;
  std::deque<std::function<void()>> to_host;  // snapshots that wait for a host synchronisation
};

std::recursive_mutex mutex;
std::map<void *, Block> blocks;  // device memory by address
std::set<void *> pinned;
std::map<c10::StreamId, Queue> queues;
std::unordered_map<void *, std::vector<c10::StreamId>> events;  // what an event stands behind
c10::StreamId current = 0;
c10::StreamId next_stream = 1;
int64_t live = 0, peak = 0, limit = 0, syncs = 0, h2d = 0, d2h = 0, unpinned = 0;
int open_depth = 0;
int computing = 0;  // inside an operation: its own copies to the CPU and back are no copies of the program's

size_t pages(size_t n) { return (n + 4095) / 4096 * 4096 + 4096; }

// While one lives, device memory may be touched.
struct Open {
  std::lock_guard<std::recursive_mutex> lock{mutex};
  Open() {
    if (open_depth++ == 0) {
      for (auto &[p, b] : blocks) mprotect(p, pages(b.bytes), PROT_READ | PROT_WRITE);
    }
  }
  ~Open() {
    if (--open_depth == 0) {
      for (auto &[p, b] : blocks) mprotect(p, pages(b.bytes), PROT_NONE);
    }
  }
};

void drain(c10::StreamId stream) {
  auto &queue = queues[stream];
  while (!queue.to_device.empty()) {
    auto copy = std::move(queue.to_device.front());
    queue.to_device.pop_front();
    copy.run();
  }
}
void deliver(c10::StreamId stream) {
  drain(stream);
  auto &queue = queues[stream];
  while (!queue.to_host.empty()) {
    queue.to_host.front()();
    queue.to_host.pop_front();
  }
}
void settle() {
  Open open;
  for (auto &[id, queue] : queues) deliver(id);
}
void synchronize_all() {
  ++syncs;
  settle();
}

struct SimAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard<std::recursive_mutex> lock{mutex};
    if (n == 0) return {nullptr, nullptr, &release, c10::Device(kSim, 0)};
    TORCH_CHECK(limit == 0 || live + int64_t(n) <= limit, "sim: out of device memory");
    void *p = mmap(nullptr, pages(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "sim: mmap failed");
    std::memset(p, 0xFF, n);
    if (open_depth == 0) mprotect(p, pages(n), PROT_NONE);
    blocks[p] = {n};
    live += n;
    peak = std::max(peak, live);
    return {p, p, &release, c10::Device(kSim, 0)};
  }
  static void release(void *p) {
    if (p == nullptr) return;
    std::lock_guard<std::recursive_mutex> lock{mutex};
    auto found = blocks.find(p);
    if (found == blocks.end()) return;
    live -= found->second.bytes;
    munmap(p, pages(found->second.bytes));
    blocks.erase(found);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t n) const override {
    Open open;
    std::memcpy(to, from, n);
  }
};
SimAllocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void *p = nullptr;
    TORCH_CHECK(posix_memalign(&p, 64, std::max<size_t>(n, 64)) == 0, "sim: no memory");
    std::lock_guard<std::recursive_mutex> lock{mutex};
    pinned.insert(p);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void *p) {
    std::lock_guard<std::recursive_mutex> lock{mutex};
    pinned.erase(p);
    std::free(p);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void *to, const void *from, size_t n) const override { std::memcpy(to, from, n); }
};
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device d) const override { return d; }
  c10::Device getDevice() const override { return {kSim, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream make(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kSim, 0), id); }
  c10::Stream getStream(c10::Device) const override { return make(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return make(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return make(next_stream++); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return make(next_stream++); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const auto before = current;
    current = s.id();
    return make(before);
  }
  bool queryStream(const c10::Stream &s) const override { return queues[s.id()].to_device.empty(); }
  void synchronizeStream(const c10::Stream &s) const override {
    Open open;
    ++syncs;
    deliver(s.id());
  }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize_all(); }
  void record(void **event, const c10::Stream &s, c10::DeviceIndex, c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> lock{mutex};
    if (*event == nullptr) *event = new int(0);
    events[*event] = {s.id()};
  }
  void block(void *event, const c10::Stream &) const override {
    Open open;  // what the event stands behind has to have happened before the stream goes on
    for (const auto id : events[event]) drain(id);
  }
  bool queryEvent(void *) const override { return true; }
  void synchronizeEvent(void *event) const override {
    Open open;
    ++syncs;
    for (const auto id : events[event]) deliver(id);
  }
  void destroyEvent(void *event, c10::DeviceIndex) const noexcept override {
    std::lock_guard<std::recursive_mutex> lock{mutex};
    events.erase(event);
    delete static_cast<int *>(event);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator *getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void *p) const override {
    std::lock_guard<std::recursive_mutex> lock{mutex};
    return pinned.count(const_cast<void *>(p)) != 0;
  }
  at::Device getDeviceFromPtr(void *) const override { return {kSim, 0}; }
  void resizePrivateUse1Bytes(const c10::Storage &storage, size_t n) const override {
    at::DataPtr fresh = allocator.allocate(n);
    Open open;
    if (storage.data() != nullptr) std::memcpy(fresh.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(n);
  }
};
Hooks hooks;

// ---- operations -----------------------------------------------------------------------------------------------------

at::Tensor empty_memory(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(kKey),
                                   dtype.value_or(at::kFloat), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(kKey),
                                           dtype.value_or(at::kFloat));
}

// A CPU tensor over the same memory; to be used while an Open lives.
at::Tensor as_host(const at::Tensor &t) {
  if (t.device().type() != kSim) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor &from, const at::Tensor &to, bool non_blocking) {
  Open open;
  const bool upward = to.device().type() == kSim && from.device().type() != kSim;
  const bool downward = from.device().type() == kSim && to.device().type() != kSim;
  drain(current);
  if (computing > 0) {
    as_host(to).copy_(as_host(from));
    return to;
  }
  if (upward) ++h2d;
  if (downward) ++d2h;
  if (!non_blocking || (!upward && !downward)) {
    if (upward || downward) ++syncs;
    if (downward) deliver(current);
    as_host(to).copy_(as_host(from));
    return to;
  }
  const at::Tensor &host = upward ? from : to;
  if (pinned.count(const_cast<void *>(host.storage().data())) == 0) ++unpinned;
  if (upward) {
    as_host(to).view(at::kByte).fill_(0xFF);
    queues[current].to_device.push_back({[from, to] { as_host(to).copy_(from); }});
  } else {
    const at::Tensor snapshot = as_host(from).clone();
    at::Tensor seen = to;
    seen.view(at::kByte).fill_(0xFF);
    queues[current].to_host.push_back([snapshot, to]() mutable { to.copy_(snapshot); });
  }
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor as_strided(const at::Tensor &self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto result = at::detail::make_tensor<at::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                        self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                      offset ? offset->expect_int() : self.storage_offset());
  return result;
}
at::Tensor view(const at::Tensor &self, c10::SymIntArrayRef size) {
  const std::vector<int64_t> wanted = at::infer_size(C10_AS_INTARRAYREF_SLOW(size), self.numel());
  const auto stride = at::detail::computeStride(self.sizes(), self.strides(), wanted);
  TORCH_CHECK(stride.has_value(), "sim: this view needs a copy");
  auto result = at::detail::make_tensor<at::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                        self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_storage_offset(self.storage_offset());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(wanted, *stride);
  return result;
}
at::Tensor reshape_alias(const at::Tensor &self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, self.storage_offset());
}
const at::Tensor &resize(const at::Tensor &self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  return self;
}
at::Scalar local_scalar(const at::Tensor &self) {
  Open open;
  if (computing == 0) {
    ++syncs;
    deliver(current);
  }
  return as_host(self).item();
}

void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
  const auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  const auto check = [&](const at::Tensor &t) {
    TORCH_CHECK(!t.defined() || t.dim() == 0 || t.device().type() == kSim, "sim: ", op.schema().name(),
                " got a tensor on ", t.device());
  };
  for (const auto &value : arguments) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList()) {
      for (const at::Tensor &t : value.toTensorVector()) check(t);
    }
  }
  Open open;
  drain(current);
  struct Computing {
    Computing() { ++computing; }
    ~Computing() { --computing; }
  } inside;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("_local_scalar_dense", &local_scalar);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace

extern "C" {
void sim_register() { at::RegisterPrivateUse1HooksInterface(&hooks); }
void sim_limit(int64_t bytes) { limit = bytes; }
void sim_counters(int64_t *out) {
  const int64_t values[] = {syncs, h2d, d2h, unpinned, live, peak};
  std::memcpy(out, values, sizeof values);
}
}

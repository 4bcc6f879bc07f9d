// Fibers: each has a stack of its own and switches by exchanging the registers that a call keeps.
// A fiber runs until it waits; the scheduler then takes the next one that can run. Warps and lanes
// are ready in the order in which they were released, which is permuted if a seed is set.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

#include "cuda/device.cuh"

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SLA2_ASAN 1
#else
#define SLA2_ASAN 0
#endif

// void sla2_switch_fiber(void** from, void* to): saves the stack pointer in *from, continues at to.
asm(R"(
.text
.globl sla2_switch_fiber
.type sla2_switch_fiber,@function
sla2_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sla2_switch_fiber,.-sla2_switch_fiber
)");
extern "C" void sla2_switch_fiber(void** from, void* to);

namespace sla2::emulated {

constinit thread_local const Place* here = nullptr;

namespace {

constexpr std::size_t kStackBytes = SLA2_ASAN != 0 ? 512 * 1024 : 128 * 1024;
constexpr std::size_t kPage = 4096;
constexpr int kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xFF;  // NaN in every float type, -1 in the integers

/// A stack with an unmapped page below it.
class Stack {
 public:
  Stack() {
    memory_ = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(memory_, kPage, PROT_NONE) != 0) {
      throw Error(ErrorKind::kRuntime, "emulator: no memory for the stack of a fiber");
    }
  }
  ~Stack() { munmap(memory_, kStackBytes + kPage); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  [[nodiscard]] std::byte* bottom() const { return static_cast<std::byte*>(memory_) + kPage; }
  [[nodiscard]] std::byte* top() const { return bottom() + kStackBytes; }

 private:
  void* memory_ = nullptr;
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Fiber {
  Place place;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  std::unique_ptr<Stack> stack;
  std::vector<Copy> issued;                 // not committed yet
  std::deque<std::vector<Copy>> under_way;  // committed groups
};

/// Lanes of one warp that wait for the others.
struct Warp {
  const char* what = nullptr;
  int arrived = 0;
  void* operands[32] = {};
};

class Machine {
 public:
  Emulator settings;
  Statistics counts;
  Fiber* current = nullptr;

  void run_grid(const Launch& launch, Grid grid, int threads, std::size_t shared);
  void rendezvous(const char* what, void* operand, Combine combine);
  int block_rendezvous(int value);
  unsigned char* shared(std::size_t offset, std::size_t alignment);
  void check_shared(const void* pointer, std::size_t bytes) const;
  /// Body of a fiber.
  void enter();

 private:
  void run_block();
  void prepare(Fiber& fiber);
  void leave(bool for_good = false);  // lets the next ready fiber run
  void release(int first, int count);
  void switch_to(Fiber* next, bool for_good = false);
  void arrive();  // a fiber took over
  [[nodiscard]] std::string where() const;

  const Launch* launch_ = nullptr;
  int threads_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::deque<int> ready_;
  std::vector<int> at_barrier_;
  int barrier_sum_ = 0;
  int barrier_result_ = 0;
  int finished_ = 0;
  unsigned char* shared_memory_ = nullptr;
  std::size_t shared_size_ = 0;
  std::exception_ptr error_;
  std::mt19937_64 random_;
  Fiber* previous_ = nullptr;  // null: the host
  void* host_stack_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  std::size_t host_size_ = 0;
};

Machine& machine() {
  static thread_local Machine one;
  return one;
}

extern "C" void sla2_fiber_main() {
  machine().enter();
  std::abort();  // a finished fiber is never continued
}

void Machine::prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = std::make_unique<Stack>();
  // Six registers, then the address that `ret` jumps to; at the entry of a function the stack
  // pointer is 8 below a multiple of 16.
  auto* top = reinterpret_cast<void**>(fiber.stack->top()) - 2;
  top[0] = reinterpret_cast<void*>(&sla2_fiber_main);
  top[1] = nullptr;
  fiber.stack_pointer = top - 6;
  std::fill_n(static_cast<void**>(fiber.stack_pointer), 6, nullptr);
  fiber.fake_stack = nullptr;
#if SLA2_ASAN
  // The frames that never return (enter and what it calls to leave) are still marked.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack->top() - kPage, kPage);
#endif
  fiber.issued.clear();
  fiber.under_way.clear();
}

void Machine::switch_to(Fiber* next, [[maybe_unused]] bool for_good) {
  Fiber* from = current;
  previous_ = from;
  current = next;
  here = next == nullptr ? nullptr : &next->place;
  void** save = from == nullptr ? &host_stack_ : &from->stack_pointer;
  void* to = next == nullptr ? host_stack_ : next->stack_pointer;
#if SLA2_ASAN
  void** fake = from == nullptr ? &host_fake_stack_ : &from->fake_stack;
  __sanitizer_start_switch_fiber(for_good ? nullptr : fake,
                                 next == nullptr ? host_bottom_ : next->stack->bottom(),
                                 next == nullptr ? host_size_ : kStackBytes);
#endif
  sla2_switch_fiber(save, to);
  arrive();
}

void Machine::arrive() {
#if SLA2_ASAN
  // The bounds of the host's stack are learned where a fiber takes over from it.
  const bool from_host = previous_ == nullptr;
  __sanitizer_finish_switch_fiber(current == nullptr ? host_fake_stack_ : current->fake_stack,
                                  from_host ? &host_bottom_ : nullptr,
                                  from_host ? &host_size_ : nullptr);
#endif
}

void Machine::enter() {
  arrive();
  try {
    launch_->run(*launch_);
    for (const auto& group : current->under_way) {
      if (!group.empty()) fail("a thread must wait for its asynchronous copies", group[0].shared);
    }
  } catch (...) {
    if (!error_) error_ = std::current_exception();
    switch_to(nullptr, true);
  }
  ++finished_;
  leave(true);
}

void Machine::leave(bool for_good) {
  if (ready_.empty()) {
    switch_to(nullptr, for_good);
    return;
  }
  const int next = ready_.front();
  ready_.pop_front();
  if (fibers_[next].get() != current) switch_to(fibers_[next].get(), for_good);
}

void Machine::release(int first, int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), first);
  if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random_);
  // A warp that goes on at once, or one that waits for all the others to stop.
  const bool at_once = settings.seed == 0 || random_() % 2 == 0;
  if (at_once) {
    ready_.insert(ready_.begin(), order.begin(), order.end());
  } else {
    ready_.insert(ready_.end(), order.begin(), order.end());
  }
}

void Machine::rendezvous(const char* what, void* operand, Combine combine) {
  const int thread = current->place.thread;
  Warp& warp = warps_[thread / 32];
  if (warp.arrived > 0 && warp.what != what && std::strcmp(warp.what, what) != 0) {
    throw Error(ErrorKind::kRuntime, "emulator: lanes of a warp must meet in one collective, got " +
                                         std::string(warp.what) + " and " + what + where());
  }
  warp.what = what;
  warp.operands[thread % 32] = operand;
  if (++warp.arrived == 32) {
    combine(warp.operands);
    warp.arrived = 0;
    release(thread / 32 * 32, 32);
  }
  leave();
}

int Machine::block_rendezvous(int value) {
  at_barrier_.push_back(current->place.thread);
  barrier_sum_ += value;
  if (std::ssize(at_barrier_) == threads_) {
    barrier_result_ = barrier_sum_;
    barrier_sum_ = 0;
    at_barrier_.clear();
    std::vector<int> warps(threads_ / 32);
    std::iota(warps.begin(), warps.end(), 0);
    if (settings.seed != 0) std::shuffle(warps.begin(), warps.end(), random_);
    for (const int warp : warps) release(warp * 32, 32);
  }
  leave();
  return barrier_result_;
}

unsigned char* Machine::shared(std::size_t offset, std::size_t alignment) {
  if (offset >= shared_size_ || offset % alignment != 0) {
    throw Error(ErrorKind::kRuntime, "emulator: shared memory offset must be aligned and below " +
                                         std::to_string(shared_size_) + ", got " +
                                         std::to_string(offset) + where());
  }
  return shared_memory_ + offset;
}

void Machine::check_shared(const void* pointer, std::size_t bytes) const {
  const auto at = reinterpret_cast<std::uintptr_t>(pointer);
  const auto begin = reinterpret_cast<std::uintptr_t>(shared_memory_);
  if (at < begin || at + bytes > begin + shared_size_) {
    fail("a matrix row or an asynchronous copy must lie in shared memory", pointer);
  }
}

std::string Machine::where() const {
  if (current == nullptr) return {};
  const Place& p = current->place;
  return " (thread " + std::to_string(p.thread) + " of block " + std::to_string(p.block[0]) + ", " +
         std::to_string(p.block[1]) + ", " + std::to_string(p.block[2]) + ")";
}

void Machine::run_block() {
  const std::unique_ptr<unsigned char, decltype(&std::free)> memory(
      static_cast<unsigned char*>(
          std::aligned_alloc(128, std::max<std::size_t>(128, (shared_size_ + 127) / 128 * 128))),
      &std::free);
  shared_memory_ = memory.get();
  std::memset(shared_memory_, kPoison, shared_size_);
  warps_.assign(threads_ / 32, {});
  ready_.clear();
  at_barrier_.clear();
  barrier_sum_ = 0;
  finished_ = 0;
  for (int t = 0; t < threads_; ++t) prepare(*fibers_[t]);
  for (int warp = threads_ / 32 - 1; warp >= 0; --warp) release(warp * 32, 32);
  while (!ready_.empty() && !error_) {
    const int next = ready_.front();
    ready_.pop_front();
    switch_to(fibers_[next].get());
  }
  if (error_) {
    fibers_.clear();  // their stacks hold frames that nobody will leave
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
  if (finished_ != threads_) {
    std::string waiting;
    for (const Warp& warp : warps_) {
      if (warp.arrived > 0) {
        waiting += "; " + std::to_string(warp.arrived) + " lanes of a warp at " + warp.what;
      }
    }
    const std::size_t waiting_threads = at_barrier_.size();
    fibers_.clear();
    throw Error(ErrorKind::kRuntime,
                "emulator: all threads of a block must reach the barrier, got " +
                    std::to_string(waiting_threads) + " waiting and " + std::to_string(finished_) +
                    " finished of " + std::to_string(threads_) + waiting);
  }
}

void Machine::run_grid(const Launch& launch, Grid grid, int threads, std::size_t shared) {
  if (threads <= 0 || threads > kMaxThreads || threads % 32 != 0) {
    throw Error(ErrorKind::kRuntime, "emulator: threads must be a multiple of 32 up to 1024, got " +
                                         std::to_string(threads));
  }
  if (shared > settings.device.shared_bytes) {
    throw Error(ErrorKind::kRuntime, "emulator: shared memory must be at most " +
                                         std::to_string(settings.device.shared_bytes) +
                                         " bytes, got " + std::to_string(shared));
  }
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    throw Error(ErrorKind::kRuntime, "emulator: a grid must fit [2^31, 65535, 65535], got [" +
                                         std::to_string(grid.x) + ", " + std::to_string(grid.y) +
                                         ", " + std::to_string(grid.z) + "]");
  }
  ++counts.launches;
  launch_ = &launch;
  threads_ = threads;
  shared_size_ = shared;
  random_.seed(settings.seed);
  while (std::ssize(fibers_) < threads) fibers_.push_back(std::make_unique<Fiber>());
  std::vector<std::int64_t> order(static_cast<std::size_t>(grid.x * grid.y * grid.z));
  std::iota(order.begin(), order.end(), 0);
  if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random_);
  for (const std::int64_t at : order) {
    for (int t = 0; t < threads; ++t) {
      fibers_[t]->place = {t,
                           {static_cast<int>(at % grid.x), static_cast<int>(at / grid.x % grid.y),
                            static_cast<int>(at / (grid.x * grid.y))},
                           grid,
                           threads};
    }
    run_block();
  }
}

}  // namespace

Emulator& emulator() { return machine().settings; }
Statistics& statistics() { return machine().counts; }
void rendezvous(const char* what, void* operand, Combine combine) {
  machine().rendezvous(what, operand, combine);
}
int block_rendezvous(int value) { return machine().block_rendezvous(value); }
unsigned char* shared_bytes(std::size_t offset, std::size_t alignment) {
  return machine().shared(offset, alignment);
}
void run_grid(const Launch& launch, Grid grid, int threads, std::size_t shared) {
  machine().run_grid(launch, grid, threads, shared);
}
void check_shared(const void* pointer, std::size_t bytes) {
  machine().check_shared(pointer, bytes);
}

void fail(const char* rule, const void* address) {
  throw Error(ErrorKind::kRuntime, std::string("emulator: ") + rule + ", got address " +
                                       std::to_string(reinterpret_cast<std::uintptr_t>(address)));
}

void issue_copy(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0) {
    fail("an asynchronous copy must go to a multiple of 16", shared);
  }
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {  // even where nothing is read
    fail("an asynchronous copy must come from a multiple of 16", global);
  }
  check_shared(shared, 16);
  std::memset(shared, kPoison, 16);
  machine().current->issued.push_back({shared, global, valid});
}

void commit_copies() {
  Fiber& fiber = *machine().current;
  fiber.under_way.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}

void wait_copies(int pending) {
  Fiber& fiber = *machine().current;
  while (std::ssize(fiber.under_way) > pending) {
    for (const Copy& copy : fiber.under_way.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
    fiber.under_way.pop_front();
  }
}

}  // namespace sla2::emulated

#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#error "Compile emulator.cpp without sanitizers: it finds theirs when it runs, and its own state is not the kernels'."
#endif

// Null unless the program is linked with the sanitizer.
#define CE_WEAK __attribute__((weak))
extern "C" {
CE_WEAK void __asan_poison_memory_region(const volatile void*, size_t);
CE_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
CE_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
CE_WEAK void* __tsan_get_current_fiber();
CE_WEAK void* __tsan_create_fiber(unsigned flags);
CE_WEAK void __tsan_destroy_fiber(void* fiber);
CE_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
CE_WEAK void __tsan_acquire(void* address);
CE_WEAK void __tsan_release(void* address);
}

// The switch between stacks. swapcontext() makes two system calls each time.
#if defined(__x86_64__) && !defined(CE_EMULATOR_UCONTEXT)

using Context = void*;  // the stack pointer, below which the registers are

extern "C" void ce_emulator_swap(Context* from, Context to);
asm(R"(
.pushsection .text
.hidden ce_emulator_swap
.globl ce_emulator_swap
.type ce_emulator_swap, @function
ce_emulator_swap:
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
.size ce_emulator_swap, .-ce_emulator_swap
.popsection
)");

static void swap_context(Context& from, Context& to) {
  ce_emulator_swap(&from, to);
}

static void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // 16-byte aligned, as before a call
  *--top = nullptr;                                          // the return address of `entry`
  *--top = reinterpret_cast<void*>(entry);
  context = std::fill_n(top - 6, 6, nullptr) - 6;
}

#else

#include <ucontext.h>

using Context = ucontext_t;

static void swap_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}

static void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 196 << 10;  // with the guard no power of two, for the caches
constexpr size_t kGuardBytes = 64 << 10;   // a whole number of pages anywhere

const char* const kOpNames[] = {"__syncwarp", "__shfl_sync", "__shfl_xor_sync", "__ballot_sync", "__any_sync"};

enum class Wait { kNone, kBlock, kCluster, kWarp, kMbarrier };

// A warp operation that some lanes have begun and not all have left.
struct alignas(8) Pending {
  WarpOp op;
  unsigned mask;
  int width, bytes;
  unsigned arrived, left;
};

struct Thread;

struct Warp {
  Thread* threads = nullptr;
  unsigned lanes = 0;  // that have not exited
  unsigned ready = 0;
  unsigned used = 0;  // of `pending`
  Pending pending[kWarp] = {};
};

// Tokens are addresses to acquire and release for ThreadSanitizer. A barrier needs two: no thread reaches the next but
// one before all have left this one.
struct Barrier {
  unsigned arrived = 0, phase = 0;
  uint64_t tokens[2] = {};

  uint64_t* token(unsigned at) { return &tokens[at & 1]; }
};

// What is in the kernel's memory.
struct alignas(8) Mbarrier {
  int32_t bytes;             // that are expected, less those that have come
  int8_t arrivals, missing;  // of a phase
  uint8_t phase, mark;

  static constexpr uint8_t kMark = 0xb5;
};

struct Block {
  uint3 index = {};
  unsigned rank = 0;
  Thread* threads = nullptr;
  char* shared = nullptr;
  unsigned exited = 0;
  Barrier barrier;
  uint64_t exit_token = 0;
};

struct Unmap {
  void operator()(char* stack) const { munmap(stack - kGuardBytes, kGuardBytes + kStackBytes); }
};

struct Fiber {
  Context context;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

struct Thread : Fiber {
  std::unique_ptr<char, Unmap> stack;
  uint3 index;
  Block* block;
  Warp* warp;
  unsigned lane;
  Wait wait;
  Pending* pending;
  const void* mbarrier;    // that it waits at
  uint64_t value, result;  // of its warp operation
  int source;
  bool arrived;  // at the cluster barrier, and has not waited
  unsigned cluster_phase;
  bool fenced;
  std::vector<const void*> atomics;  // since the last fence
  std::deque<Copy> copies;           // that it has not waited for
  size_t groups;                     // of copies that it has committed
};

enum class Order { kForward, kReverse, kRandom };

// Made anew each time, so that no token makes ThreadSanitizer believe it ordered after an earlier one.
struct Cluster {
  Thread* threads = nullptr;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  unsigned exited = 0;
  Barrier barrier;
  uint64_t exit_token = 0;
};

// What one thread of the process runs.
struct Launch {
  const char* kernel = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  unsigned block_size = 0, cluster_size = 0;
  size_t clusters = 0;  // that have started
  size_t shared_bytes = 0;
  Order order = Order::kForward;
  std::minstd_rand random;
  uint64_t begin_token = 0, end_token = 0;

  Fiber scheduler;
  std::vector<Thread> threads;
  std::unique_ptr<Cluster> cluster;

  unsigned running() const { return block_size * cluster_size; }

  ~Launch() {
    for (Thread& thread : threads) {
      if (thread.tsan_fiber) __tsan_destroy_fiber(thread.tsan_fiber);
    }
  }
};

__thread Launch* launch_ = nullptr;
struct Counted {
  const void *begin, *end;
  size_t bytes;
};
__thread Counted counted_ = {};
__thread Thread* self_ = nullptr;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  std::fputs("emulator: ", stderr);
  if (launch_) std::fprintf(stderr, "%s: ", launch_->kernel);
  if (self_) {
    const uint3 b = self_->block->index, t = self_->index;
    std::fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputs("\n", stderr);
  std::abort();
}

Thread& self_in(const char* function) {
  if (!self_) fail("%s outside a kernel", function);
  return *self_;
}

bool is_in_own_shared(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - self_->block->shared) < launch_->shared_bytes;
}

void acquire(const void* token) {
  if (__tsan_acquire) __tsan_acquire(const_cast<void*>(token));
}

void release(const void* token) {
  if (__tsan_release) __tsan_release(const_cast<void*>(token));
}

void switch_fiber(Fiber& from, Fiber& to, bool for_ever = false) {
  constexpr unsigned kNoSync = 1;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.asan_stack, to.bottom, to.bytes);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber, kNoSync);
  swap_context(from.context, to.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.asan_stack, nullptr, nullptr);
}

unsigned choose_lane(unsigned ready) {
  if (launch_->order == Order::kForward) return __builtin_ctz(ready);
  if (launch_->order == Order::kReverse) return 31 - __builtin_clz(ready);
  const unsigned first = launch_->random() % kWarp;
  const uint64_t rotated = (uint64_t(ready) << kWarp | ready) >> first;
  return (__builtin_ctzll(rotated) + first) % kWarp;
}

// Runs another lane of the warp; the scheduler where there is none, and now and then in random order.
void run_next(Fiber& from, Warp& warp, bool for_ever = false) {
  if (!warp.ready || (launch_->order == Order::kRandom && self_ && launch_->random() % 4 == 0)) {
    self_ = nullptr;
    switch_fiber(from, launch_->scheduler, for_ever);
    return;
  }
  const unsigned lane = choose_lane(warp.ready);
  warp.ready &= ~(1u << lane);
  self_ = &warp.threads[lane];
  threadIdx = self_->index;
  blockIdx = self_->block->index;
  switch_fiber(from, *self_, for_ever);
}

void wait_at(Wait what, Pending* pending = nullptr) {
  Thread& self = *self_;
  self.wait = what;
  self.pending = pending;
  run_next(self, *self.warp);
}

void wake(Thread* threads, size_t count, Wait what, const void* mbarrier = nullptr) {
  for (size_t i = 0; i < count; i++) {
    Thread& thread = threads[i];
    if (thread.wait != what || (mbarrier && thread.mbarrier != mbarrier)) continue;
    thread.wait = Wait::kNone;
    thread.warp->ready |= 1u << thread.lane;
  }
}

std::string describe(const Thread& thread) {
  if (thread.wait == Wait::kBlock) return "__syncthreads";
  if (thread.wait == Wait::kCluster) return "__cluster_barrier_wait";
  if (thread.wait == Wait::kMbarrier) return "mbarrier_wait";
  char text[64];
  std::snprintf(text, sizeof(text), "%s with mask 0x%08x", kOpNames[int(thread.pending->op)], thread.pending->mask);
  return text;
}

[[noreturn]] void fail_deadlock() {
  const auto waits = [](const Thread& thread) { return thread.wait != Wait::kNone; };
  Thread* const end = launch_->cluster->threads + launch_->running();
  Thread* const first = std::find_if(launch_->cluster->threads, end, waits);
  Thread* const other = std::find_if(first, end, [&](const Thread& thread) {
    return waits(thread) && (thread.wait != first->wait || thread.pending != first->pending);
  });
  self_ = first;
  if (other == end) fail("deadlock: waits at %s, which others have not reached", describe(*first).c_str());
  fail("deadlock: waits at %s, but thread (%u, %u, %u) of block (%u, %u, %u) at %s", describe(*first).c_str(),
       other->index.x, other->index.y, other->index.z, other->block->index.x, other->block->index.y,
       other->block->index.z, describe(*other).c_str());
}

void exit_thread(Thread& thread) {
  Cluster& cluster = *launch_->cluster;
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  const unsigned bit = 1u << thread.lane;
  if (!thread.copies.empty()) fail("exits with %zu copies that it has not waited for", thread.copies.size());
  if (block.barrier.arrived) fail("exits while %u threads of its block wait at __syncthreads", block.barrier.arrived);
  if (thread.arrived) fail("exits after __cluster_barrier_arrive without __cluster_barrier_wait");
  if (cluster.barrier.arrived) {
    fail("exits while %u threads have arrived at the cluster barrier", cluster.barrier.arrived);
  }
  for (unsigned used = warp.used; used; used &= used - 1) {
    const Pending& pending = warp.pending[__builtin_ctz(used)];
    if ((pending.mask & bit) && pending.arrived != pending.mask) {
      fail("exits while others wait for it at %s with mask 0x%08x", kOpNames[int(pending.op)], pending.mask);
    }
  }
  warp.lanes &= ~bit;

  release(&block.exit_token);
  if (++block.exited == launch_->block_size) {
    acquire(&block.exit_token);
    std::memset(block.shared, 0xff, launch_->shared_bytes);
    if (__asan_poison_memory_region) __asan_poison_memory_region(block.shared, launch_->shared_bytes);
  }
  release(&cluster.exit_token);
  release(&launch_->end_token);
  if (++cluster.exited == launch_->running()) {
    acquire(&cluster.exit_token);
    for (Block& b : cluster.blocks) std::free(b.shared);
  }
}

void thread_main() {
  if (__sanitizer_finish_switch_fiber) {
    // The first one of all comes from the scheduler, and tells where its stack is.
    Fiber& scheduler = launch_->scheduler;
    const bool first = !scheduler.bottom;
    __sanitizer_finish_switch_fiber(nullptr, first ? &scheduler.bottom : nullptr, first ? &scheduler.bytes : nullptr);
  }
  acquire(&launch_->begin_token);
  launch_->body(launch_->argument);
  Thread& self = *self_;
  exit_thread(self);
  run_next(self, *self.warp, true);
  std::abort();
}

// Threads of earlier launches keep their stacks.
void make_stacks(size_t count) {
  for (size_t i = launch_->threads.size(); i < count; i++) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE)) fail("no memory for %zu stacks", count);
    Thread& thread = launch_->threads.emplace_back();
    thread.stack.reset(static_cast<char*>(memory) + kGuardBytes);
    thread.bottom = thread.stack.get();
    // Stacks that all began at one offset within a page would share a few lines of the cache.
    thread.bytes = kStackBytes - i % 63 * 64;
    if (__tsan_create_fiber) thread.tsan_fiber = __tsan_create_fiber(0);
  }
}

void start_cluster(uint3 first) {
  const unsigned size = launch_->block_size, warps = (size + kWarp - 1) / kWarp;
  launch_->cluster = std::make_unique<Cluster>();
  Cluster& cluster = *launch_->cluster;
  cluster.threads =
      &launch_->threads[launch_->clusters++ % (launch_->threads.size() / launch_->running()) * launch_->running()];
  cluster.blocks = std::vector<Block>(launch_->cluster_size);
  cluster.warps = std::vector<Warp>(warps * launch_->cluster_size);
  for (unsigned rank = 0; rank < launch_->cluster_size; rank++) {
    Block& block = cluster.blocks[rank];
    block.index = {first.x + rank, first.y, first.z};
    block.rank = rank;
    block.threads = cluster.threads + rank * size;
    block.shared = static_cast<char*>(std::malloc(launch_->shared_bytes));
    std::memset(block.shared, 0xff, launch_->shared_bytes);
    for (unsigned i = 0; i < size; i++) {
      Thread& thread = block.threads[i];
      thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      thread.block = &block;
      thread.warp = &cluster.warps[rank * warps + i / kWarp];
      thread.lane = i % kWarp;
      thread.wait = Wait::kNone;
      thread.pending = nullptr;
      thread.arrived = thread.fenced = false;
      thread.atomics.clear();
      thread.copies.clear();
      thread.groups = 0;
      if (thread.lane == 0) thread.warp->threads = &thread;
      thread.warp->lanes |= 1u << thread.lane;
      thread.warp->ready = thread.warp->lanes;
      make_context(thread.context, thread.stack.get(), thread.bytes, thread_main);
    }
  }
}

void run_cluster(uint3 first) {
  start_cluster(first);
  // Nothing is acquired before the end of the launch: its clusters are not ordered.
  release(&launch_->begin_token);
  std::vector<Warp>& warps = launch_->cluster->warps;
  while (launch_->cluster->exited < launch_->running()) {
    const size_t offset = launch_->order == Order::kRandom ? launch_->random() % warps.size() : 0;
    bool any = false;
    for (size_t i = 0; i < warps.size(); i++) {
      Warp& warp = warps[launch_->order == Order::kReverse ? warps.size() - 1 - i : (i + offset) % warps.size()];
      if (!warp.ready) continue;
      any = true;
      run_next(launch_->scheduler, warp);
    }
    if (!any) fail_deadlock();
  }
}

void check_launch(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes) {
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  if (size < 1 || size > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    fail("a block of (%u, %u, %u) threads", block.x, block.y, block.z);
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    fail("a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  }
  if (cluster < 1 || cluster > 16 || int(cluster) > properties().max_cluster) fail("a cluster of %u blocks", cluster);
  if (grid.x % cluster) fail("a grid of %u blocks along x in clusters of %u", grid.x, cluster);
  if (shared_bytes > size_t(properties().shared_memory)) {
    fail("%zu bytes of shared memory, of which there are %d", shared_bytes, properties().shared_memory);
  }
}

Order order_from_environment() {
  const char* text = std::getenv("CE_EMULATOR_ORDER");
  const std::string order = text ? text : "forward";
  if (order == "forward") return Order::kForward;
  if (order == "reverse") return Order::kReverse;
  if (order == "random") return Order::kRandom;
  fail("CE_EMULATOR_ORDER=%s", text);
}

int from_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  if (!text) return otherwise;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end || value < 1 || value > 1 << 30) fail("%s=%s", name, text);
  return int(value);
}

// The lane that `lane` reads; its own one past the end of its segment, as on the device.
int source_lane(WarpOp op, int lane, int argument, int width) {
  const int segment = lane & -width;
  if (op == WarpOp::kShuffle) return segment | (argument & (width - 1));
  const int source = lane ^ argument;
  return source >= 0 && source < segment + width ? source : lane;
}

void complete(const Pending& pending, Thread* lanes) {
  unsigned ballot = 0;
  for (unsigned i = 0; i < kWarp; i++) {
    if ((pending.mask >> i & 1) && lanes[i].value) ballot |= 1u << i;
  }
  for (unsigned i = 0; i < kWarp; i++) {
    if (!(pending.mask >> i & 1)) continue;
    Thread& thread = lanes[i];
    switch (pending.op) {
      case WarpOp::kSync:
        break;
      case WarpOp::kShuffle:
      case WarpOp::kShuffleXor:
        thread.result = lanes[thread.source].value;
        break;
      case WarpOp::kBallot:
        thread.result = ballot;
        break;
      case WarpOp::kAny:
        thread.result = ballot != 0;
        break;
    }
    if (&thread == self_) continue;
    thread.wait = Wait::kNone;
    thread.warp->ready |= 1u << i;
  }
}

}  // namespace

Properties& properties() {
  static Properties properties = [] {
    Properties p;
    p.multiprocessors = from_environment("CE_EMULATOR_MULTIPROCESSORS", p.multiprocessors);
    p.shared_memory = from_environment("CE_EMULATOR_SHARED_MEMORY", p.shared_memory);
    p.max_cluster = from_environment("CE_EMULATOR_MAX_CLUSTER", p.max_cluster);
    return p;
  }();
  return properties;
}

void run(const char* kernel_name, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*body)(void*),
         void* argument) {
  if (self_) fail("launches %s", kernel_name);
  thread_local Launch launch;
  launch.kernel = kernel_name;
  launch.body = body;
  launch.argument = argument;
  launch_ = &launch;
  check_launch(grid, block, cluster, shared_bytes);
  launch.block_size = block.x * block.y * block.z;
  launch.cluster_size = cluster;
  launch.shared_bytes = shared_bytes;
  launch.order = order_from_environment();
  launch.clusters = 0;
  // ThreadSanitizer sees no race between threads that ran on the same fiber, and takes 0.4 ms to make one.
  make_stacks(__tsan_create_fiber ? std::max({launch.running(), std::min(2 * launch.running(), 2048u), 256u})
                                  : launch.running());
  if (__tsan_get_current_fiber) launch.scheduler.tsan_fiber = __tsan_get_current_fiber();
  blockDim = block;
  gridDim = grid;

  const size_t columns = grid.x / cluster, count = columns * grid.y * grid.z;
  std::vector<size_t> shuffled(launch.order == Order::kRandom ? count : 0);
  std::iota(shuffled.begin(), shuffled.end(), size_t(0));
  std::shuffle(shuffled.begin(), shuffled.end(), launch.random);
  for (size_t i = 0; i < count; i++) {
    const size_t at = launch.order == Order::kForward   ? i
                      : launch.order == Order::kReverse ? count - 1 - i
                                                        : shuffled[i];
    run_cluster({unsigned(at % columns) * cluster, unsigned(at / columns % grid.y), unsigned(at / columns / grid.y)});
  }
  acquire(&launch.end_token);
  launch_ = nullptr;
}

void* dynamic_shared() {
  return self_in("dynamic_shared").block->shared;
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int lane, int width, int bytes) {
  const char* const name = kOpNames[int(op)];
  Thread& self = self_in(name);
  Warp& warp = *self.warp;
  const unsigned bit = 1u << self.lane;
  if (!(mask & bit)) fail("%s with mask 0x%08x, which does not name its own lane %u", name, mask, self.lane);
  if (mask & ~warp.lanes) {
    const unsigned missing = __builtin_ctz(mask & ~warp.lanes);
    fail("%s with mask 0x%08x, whose lane %u has exited or never was", name, mask, missing);
  }
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s with width %d", name, width);
  self.value = value;
  self.source = int(self.lane);
  if (op == WarpOp::kShuffle || op == WarpOp::kShuffleXor) self.source = source_lane(op, int(self.lane), lane, width);
  if (!(mask >> self.source & 1))
    fail("%s reads lane %d, which its mask 0x%08x does not name", name, self.source, mask);

  Pending* pending = nullptr;
  for (unsigned used = warp.used; used && !pending; used &= used - 1) {
    Pending& candidate = warp.pending[__builtin_ctz(used)];
    if (candidate.mask == mask && candidate.arrived != mask) pending = &candidate;
  }
  if (!pending) {
    const unsigned slot = __builtin_ctz(~warp.used);
    warp.used |= 1u << slot;
    pending = &warp.pending[slot];
    *pending = {op, mask, width, bytes, 0, 0};
  } else if (pending->op != op || pending->width != width || pending->bytes != bytes) {
    fail("%s of %d bytes with width %d, but lanes of its mask 0x%08x wait at %s of %d bytes with width %d", name, bytes,
         width, mask, kOpNames[int(pending->op)], pending->bytes, pending->width);
  }

  // Of the warp's operations only __syncwarp orders memory.
  if (op == WarpOp::kSync) release(pending);
  pending->arrived |= bit;
  if (pending->arrived == mask) {
    complete(*pending, warp.threads);
  } else {
    wait_at(Wait::kWarp, pending);
  }
  if (op == WarpOp::kSync) acquire(pending);
  pending->left |= bit;
  if (pending->left == mask) warp.used &= ~(1u << (pending - warp.pending));
  return self.result;
}

void check_vector_access(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned access of %zu bytes at %p", bytes, address);
}

void count_reads_of(const void* begin, const void* end) {
  counted_ = {begin, end, 0};
}
size_t counted_bytes() {
  return counted_.bytes;
}
void note_read(const void* address, size_t bytes) {
  if (address >= counted_.begin && address < counted_.end) counted_.bytes += bytes;
}

void begin_copy(void* to, const void* from, size_t bytes) {
  note_read(from, bytes);
  Thread& self = self_in("__pipeline_memcpy_async");
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("__pipeline_memcpy_async of %zu bytes", bytes);
  check_vector_access(to, bytes);
  check_vector_access(from, bytes);
  if (!is_in_own_shared(to)) fail("__pipeline_memcpy_async to what is not its shared memory");
  for (const Copy& copy : self.copies) {
    if (copy.to == to) fail("__pipeline_memcpy_async to where another copy is under way");
  }
  self.copies.push_back({to, from, bytes, self.groups});
}

bool end_copy(size_t pending, Copy& copy) {
  Thread& self = self_in("__pipeline_wait_prior");
  if (self.copies.empty() || self.copies.front().group + pending >= self.groups) return false;
  copy = self.copies.front();
  self.copies.pop_front();
  return true;
}

namespace {

Mbarrier& mbarrier_at(const char* function, const void* address) {
  self_in(function);
  check_vector_access(address, sizeof(Mbarrier));
  Mbarrier& barrier = *static_cast<Mbarrier*>(const_cast<void*>(address));
  if (barrier.mark != Mbarrier::kMark) fail("%s of what is no mbarrier yet", function);
  return barrier;
}

const void* token_of(const Mbarrier& barrier, unsigned phase) {
  return reinterpret_cast<const char*>(&barrier) + phase % 2;
}

void end_phase(Mbarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  barrier.phase++;
  wake(launch_->cluster->threads, launch_->running(), Wait::kMbarrier, &barrier);
}

}  // namespace

void mbarrier_init(void* address, int arrivals) {
  self_in("mbarrier_init");
  check_vector_access(address, sizeof(Mbarrier));
  if (!is_in_own_shared(address)) fail("mbarrier_init of what is not its shared memory");
  *static_cast<Mbarrier*>(address) = {0, int8_t(arrivals), int8_t(arrivals), 0, Mbarrier::kMark};
}

void mbarrier_arrive_expect(void* address, int bytes) {
  Mbarrier& barrier = mbarrier_at("mbarrier_arrive_expect", address);
  release(token_of(barrier, barrier.phase));
  barrier.bytes += bytes;
  barrier.missing--;
  end_phase(barrier);
}

void mbarrier_wait(void* address, int parity) {
  Mbarrier& barrier = mbarrier_at("mbarrier_wait", address);
  if (barrier.phase % 2 == parity) {
    self_->mbarrier = &barrier;
    wait_at(Wait::kMbarrier);
  }
  acquire(token_of(barrier, unsigned(parity)));
}

void begin_store(void* to, size_t bytes, const void* address) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("store_async of %zu bytes", bytes);
  check_vector_access(to, bytes);
  mbarrier_at("store_async", address);
}

void end_store(size_t bytes, void* address) {
  Mbarrier& barrier = mbarrier_at("store_async", address);
  release(token_of(barrier, barrier.phase));
  barrier.bytes -= int32_t(bytes);
  end_phase(barrier);
}

// Two threads synchronise where one has a fence before and the other one after its atomic operation at an address.
void check_atomic(const void* address, size_t bytes) {
  check_vector_access(address, bytes);
  if (!__tsan_release) return;
  Thread& self = self_in("an atomic operation");
  if (self.fenced) release(address);
  if (self.atomics.empty() || self.atomics.back() != address) self.atomics.push_back(address);
}

}  // namespace emulator

using namespace emulator;

void __syncthreads() {
  Block& block = *self_in("__syncthreads").block;
  if (block.exited) fail("__syncthreads after %u threads of its block have exited", block.exited);
  uint64_t* const token = block.barrier.token(block.barrier.phase);
  release(token);
  if (++block.barrier.arrived == launch_->block_size) {
    block.barrier.arrived = 0;
    block.barrier.phase++;
    wake(block.threads, launch_->block_size, Wait::kBlock);
  } else {
    wait_at(Wait::kBlock);
  }
  acquire(token);
}

void __pipeline_commit() {
  self_in("__pipeline_commit").groups++;
}

void __threadfence() {
  Thread& self = self_in("__threadfence");
  for (const void* address : self.atomics) acquire(address);
  self.atomics.clear();
  self.fenced = true;
}

unsigned __clusterRelativeBlockRank() {
  return self_in("__clusterRelativeBlockRank").block->rank;
}

unsigned __clusterSizeInBlocks() {
  self_in("__clusterSizeInBlocks");
  return launch_->cluster_size;
}

void __cluster_barrier_arrive() {
  Thread& self = self_in("__cluster_barrier_arrive");
  Cluster& cluster = *launch_->cluster;
  if (self.arrived) fail("__cluster_barrier_arrive twice without __cluster_barrier_wait");
  if (cluster.exited) fail("__cluster_barrier_arrive after %u threads of its cluster have exited", cluster.exited);
  self.arrived = true;
  self.cluster_phase = cluster.barrier.phase;
  release(cluster.barrier.token(self.cluster_phase));
  if (++cluster.barrier.arrived == launch_->running()) {
    cluster.barrier.arrived = 0;
    cluster.barrier.phase++;
    wake(cluster.threads, launch_->running(), Wait::kCluster);
  }
}

void __cluster_barrier_wait() {
  Thread& self = self_in("__cluster_barrier_wait");
  Barrier& barrier = launch_->cluster->barrier;
  if (!self.arrived) fail("__cluster_barrier_wait without __cluster_barrier_arrive");
  if (barrier.phase == self.cluster_phase) wait_at(Wait::kCluster);
  self.arrived = false;
  acquire(barrier.token(self.cluster_phase));
}

void* __cluster_map_shared_rank(const void* address, unsigned rank) {
  const Block& own = *self_in("__cluster_map_shared_rank").block;
  if (rank >= launch_->cluster_size)
    fail("the shared memory of rank %u in a cluster of %u", rank, launch_->cluster_size);
  const Block& other = launch_->cluster->blocks[rank];
  const size_t offset = size_t(static_cast<const char*>(address) - own.shared);
  if (offset > launch_->shared_bytes) fail("__cluster_map_shared_rank of what is not its shared memory");
  if (other.exited == launch_->block_size) fail("the shared memory of rank %u, which has exited", rank);
  return other.shared + offset;
}

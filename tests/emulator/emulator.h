// Runs CUDA kernels, unmodified, on a CPU. Each CUDA thread is a fiber; the blocks of a grid run one after another,
// those of a cluster together, all on the thread that calls launch(). Whatever CUDA leaves undefined and this can see
// ends the process with a line on stderr.
//
// CE_EMULATOR_ORDER=forward|reverse|random is the order in which threads and blocks get to run. Kernels may be compiled
// with sanitizers; emulator.cpp must not be, and finds them when it runs. Under ThreadSanitizer only what orders memory
// in CUDA orders it here: barriers, __syncwarp, and fences around atomic operations, but no shuffle and no vote.
//
// Stricter than devices: threads that have exited count as missing at every barrier and in every mask. No thread may
// spin for another one, which would not get to run. A thread waits for its asynchronous copies before it exits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Unlike thread_local, __thread makes no call of what is defined in another file.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;

namespace emulator {

// Of the emulated device. Initialised from CE_EMULATOR_MULTIPROCESSORS, _SHARED_MEMORY and _MAX_CLUSTER.
struct Properties {
  int multiprocessors = 132;
  int shared_memory = 232448;  // bytes a block
  int max_cluster = 16;        // blocks
};
Properties& properties();

// The running block's memory: 16-byte aligned, every byte 0xff when the block starts.
void* dynamic_shared();

void run(const char* kernel_name, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*body)(void*),
         void* argument);

// Calls body() once for each CUDA thread. `cluster` blocks along x make a cluster.
template <typename F>
void launch(const char* kernel_name, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, F&& body) {
  using Body = std::remove_reference_t<F>;
  run(
      kernel_name, grid, block, cluster, shared_bytes, [](void* argument) { (*static_cast<Body*>(argument))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

enum class WarpOp { kSync, kShuffle, kShuffleXor, kBallot, kAny };
uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value = 0, int lane = 0, int width = 32, int bytes = 0);

template <typename T>
T shuffle(WarpOp op, unsigned mask, T value, int lane, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_op(op, mask, bits, lane, width, sizeof(T));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

void check_vector_access(const void* address, size_t bytes);

// A copy that its thread has begun and not yet waited for.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t group;
};
void begin_copy(void* to, const void* from, size_t bytes);
// Takes the oldest copy that is not of the last `pending` groups, if there is one.
bool end_copy(size_t pending, Copy& copy);

// Of the memory [begin, end), how many bytes kernels have said that they read since.
void count_reads_of(const void* begin, const void* end);
size_t counted_bytes();
void note_read(const void* address, size_t bytes);

// A barrier in shared memory whose phase ends when all threads that it was made for have arrived, and all bytes that
// they expect.
void mbarrier_init(void* barrier, int arrivals);
void mbarrier_arrive_expect(void* barrier, int bytes);
// Until a phase of this parity, the first of which is 0, has ended.
void mbarrier_wait(void* barrier, int parity);

void begin_store(void* to, size_t bytes, const void* barrier);
void end_store(size_t bytes, void* barrier);

// Into the shared memory of another block, whose barrier counts the bytes.
inline void store_async(void* to, const void* value, size_t bytes, void* barrier) {
  begin_store(to, bytes, barrier);
  std::memcpy(to, value, bytes);
  end_store(bytes, barrier);
}

void check_atomic(const void* address, size_t bytes);

// The address of an atomic operation. The operations themselves are relaxed, as CUDA's are.
template <typename T>
T* atomic(T* address) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  check_atomic(address, sizeof(T));
  return address;
}

// Keeps a parameter from taking part in the deduction of T, so that atomicAdd(&an_unsigned, 1) is one.
template <typename T>
using Value = std::common_type_t<T>;

}  // namespace emulator

void __syncthreads();

inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulator::warp_op(emulator::WarpOp::kSync, mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle(emulator::WarpOp::kShuffle, mask, value, lane, width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulator::shuffle(emulator::WarpOp::kShuffleXor, mask, value, lane_mask, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(emulator::warp_op(emulator::WarpOp::kBallot, mask, predicate != 0));
}

inline int __any_sync(unsigned mask, int predicate) {
  return int(emulator::warp_op(emulator::WarpOp::kAny, mask, predicate != 0));
}

template <typename T>
T __ldg(const T* address) {
  emulator::check_vector_access(address, sizeof(T));
  return *address;
}

template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}

template <typename T>
void __stcs(T* address, emulator::Value<T> value) {
  emulator::check_vector_access(address, sizeof(T));
  *address = value;
}

// What is overwritten is lost when the copy begins, and what comes is there when its thread has waited for it: the copy
// may be made at any time between.
inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes) {
  emulator::begin_copy(shared, global, bytes);
  std::memset(shared, 0xff, bytes);
}
void __pipeline_commit();
inline void __pipeline_wait_prior(size_t pending) {
  for (emulator::Copy copy; emulator::end_copy(pending, copy);) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

template <typename T>
T atomicAdd(T* address, emulator::Value<T> value) {
  return __atomic_fetch_add(emulator::atomic(address), value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicExch(T* address, emulator::Value<T> value) {
  return __atomic_exchange_n(emulator::atomic(address), value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicCAS(T* address, emulator::Value<T> compare, emulator::Value<T> value) {
  __atomic_compare_exchange_n(emulator::atomic(address), &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

template <typename T>
T atomicMin(T* address, emulator::Value<T> value) {
  T old = __atomic_load_n(emulator::atomic(address), __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

void __threadfence();
inline void __threadfence_system() {
  __threadfence();
}

unsigned __clusterRelativeBlockRank();
unsigned __clusterSizeInBlocks();
void __cluster_barrier_arrive();
void __cluster_barrier_wait();
void* __cluster_map_shared_rank(const void* address, unsigned rank);

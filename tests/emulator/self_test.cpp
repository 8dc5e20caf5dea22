// Kernels for the emulator, correct ones and ones with a planted mistake: `self_test CASE...` runs them in turn and
// fails where a correct one gives a wrong result.
#include "emulator.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

namespace {

template <typename T>
T* shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value, int width = 32) {
  for (int i = width / 2; i > 0; i /= 2) value += __shfl_xor_sync(0xffffffff, value, i, width);
  return value;
}

__device__ void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

std::vector<float> iota(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; i++) values[i] = float(i);
  return values;
}

float sum(const float* values, size_t count) {
  float total = 0;
  for (size_t i = 0; i < count; i++) total += values[i];
  return total;
}

// ---- correct ----

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    block_sum(const float* __restrict__ x, const __grid_constant__ int n, float* out) {
  float* partial = shared<float>();
  float value = 0;
  for (int i = int(threadIdx.x); i < n; i += kThreads) value += __ldg(x + blockIdx.x * n + i);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = warp_sum(threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.f);
    if (threadIdx.x == 0) __stcs(out + blockIdx.x, value);
  }
}

template <int kThreads>
void run_block_sum(unsigned blocks = 3) {
  const int n = 500;
  const std::vector<float> x = iota(blocks * n);
  std::vector<float> out(blocks);
  emulator::launch("block_sum", blocks, kThreads, 1, kThreads / 32 * sizeof(float),
                   [&] { block_sum<kThreads>(x.data(), n, out.data()); });
  for (unsigned b = 0; b < blocks; b++) check(out[b] == sum(&x[b * n], n), "block_sum");
}

template <typename T>
__global__ void sum_of_8(T* x) {
  x[threadIdx.x] = warp_sum(x[threadIdx.x], 8);
}

template <typename T>
void run_sum_of_8() {
  std::vector<T> x(64);
  for (int i = 0; i < 64; i++) x[i] = T(i);
  emulator::launch("sum_of_8", 1, 64, 1, 0, [&] { sum_of_8(x.data()); });
  for (int i = 0; i < 64; i++) check(x[i] == T(i / 8 * 64 + 28), "sum_of_8");
}

__global__ void warp_votes(unsigned* out) {
  const unsigned lane = threadIdx.x, mask = lane < 8 ? 0xffu : 0xffffff00u;
  out[lane] = __shfl_sync(mask, lane, int(lane < 8 ? 3 : 11));
  __syncwarp(mask);
  if (lane < 8) out[lane] += 100 * unsigned(__any_sync(0xff, lane == 5));
  out[lane] += 1000 * (__ballot_sync(0xffffffff, lane == 2 || lane == 31) == 0x80000004u);
}

void run_warp_votes() {
  std::vector<unsigned> out(32);
  emulator::launch("warp_votes", 1, 32, 1, 0, [&] { warp_votes(out.data()); });
  for (unsigned i = 0; i < 32; i++) check(out[i] == (i < 8 ? 1103u : 1011u), "warp_votes");
}

// Each block writes its part; each then sums the parts of all.
__global__ void cluster_sum(const float* x, float* out) {
  float* own = shared<float>();
  own[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  cluster_sync();
  float total = 0;
  for (unsigned rank = 0; rank < __clusterSizeInBlocks(); rank++) {
    const auto* other = static_cast<const float*>(__cluster_map_shared_rank(own, rank));
    for (unsigned i = 0; i < blockDim.x; i++) total += other[i];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total + float(__clusterRelativeBlockRank());
  cluster_sync();
}

void run_cluster_sum() {
  for (unsigned cluster : {1u, 2u, 4u, 8u, 16u}) {
    const unsigned threads = 33, blocks = 2 * cluster;
    const std::vector<float> x = iota(blocks * threads);
    std::vector<float> out(x.size());
    emulator::launch("cluster_sum", blocks, threads, cluster, threads * sizeof(float),
                     [&] { cluster_sum(x.data(), out.data()); });
    for (unsigned b = 0; b < blocks; b++) {
      const float expected = sum(&x[b / cluster * cluster * threads], cluster * threads) + float(b % cluster);
      for (unsigned i = 0; i < threads; i++) check(out[b * threads + i] == expected, "cluster_sum");
    }
  }
}

// Two blocks, whose threads send all that they have to both, turn by turn into one of two places: a thread that has not
// seen a turn's messages arrive has not sent its own of the next, which therefore cannot all have arrived.
enum class MessageMistake { kNone, kOnePlace, kNoWait, kTooMany };
template <MessageMistake kMistake>
__global__ void pass_on(const float* x, float* out) {
  constexpr int kTurns = 3, kBlocks = 2;
  auto* const barrier = static_cast<uint64_t*>(emulator::dynamic_shared());
  auto* const places = reinterpret_cast<double*>(barrier + 1);
  const int messages = kBlocks * int(blockDim.x);
  const int bytes = (messages + (kMistake == MessageMistake::kTooMany)) * int(sizeof(double));
  if (threadIdx.x == 0) {
    emulator::mbarrier_init(barrier, 1);
    emulator::mbarrier_arrive_expect(barrier, bytes);
  }
  cluster_sync();
  const int own = int(__clusterRelativeBlockRank() * blockDim.x + threadIdx.x);
  double value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int turn = 0; turn < kTurns; turn++) {
    double* const of_turn = places + (kMistake == MessageMistake::kOnePlace ? 0 : turn % 2) * messages;
    for (unsigned rank = 0; rank < kBlocks; rank++) {
      emulator::store_async(__cluster_map_shared_rank(of_turn + own, rank), &value, sizeof(value),
                            __cluster_map_shared_rank(barrier, rank));
    }
    if (kMistake != MessageMistake::kNoWait) emulator::mbarrier_wait(barrier, turn % 2);
    if (threadIdx.x == 0 && turn + 1 < kTurns) emulator::mbarrier_arrive_expect(barrier, bytes);
    value = of_turn[(own + int(blockDim.x)) % messages] + 1;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = float(value);
  cluster_sync();
}

template <MessageMistake kMistake = MessageMistake::kNone>
void run_pass_on() {
  const unsigned threads = 40, blocks = 6;
  const std::vector<float> x = iota(blocks * threads);
  std::vector<float> out(x.size());
  emulator::launch("pass_on", blocks, threads, 2, sizeof(uint64_t) + 4 * threads * sizeof(double),
                   [&] { pass_on<kMistake>(x.data(), out.data()); });
  for (unsigned i = 0; i < x.size(); i++) {
    const unsigned from = (i / threads ^ 1) * threads + i % threads;
    check(out[i] == x[from] + 3, "pass_on");
  }
}

// Through a tile of dynamic shared memory; blocks and grid of two and three dimensions.
__global__ void transpose(const float* x, float* out) {
  float* tile = shared<float>();
  const unsigned n = blockDim.x, matrix = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  tile[threadIdx.y * n + threadIdx.x] = x[(matrix * n + threadIdx.y) * n + threadIdx.x];
  __syncthreads();
  out[(matrix * n + threadIdx.y) * n + threadIdx.x] = tile[threadIdx.x * n + threadIdx.y];
}

void run_transpose() {
  const unsigned n = 7, matrices = 2 * 3 * 2;
  const std::vector<float> x = iota(matrices * n * n);
  std::vector<float> out(x.size());
  emulator::launch("transpose", dim3(2, 3, 2), dim3(n, n), 1, n * n * sizeof(float),
                   [&] { transpose(x.data(), out.data()); });
  for (unsigned i = 0; i < out.size(); i++) {
    check(out[i] == x[i / n / n * n * n + i % n * n + i / n % n], "transpose");
  }
}

__global__ void count(unsigned* total, int* least, unsigned long long* lock, int* locked) {
  atomicAdd(total, 1);
  atomicMin(least, -int(blockIdx.x * blockDim.x + threadIdx.x));
  if (atomicCAS(lock, 0, 7) == 0) *locked = int(atomicExch(lock, 8));
}

void run_count() {
  unsigned total = 0;
  int least = 5, locked = 0;
  unsigned long long lock = 0;
  emulator::launch("count", 3, 40, 1, 0, [&] { count(&total, &least, &lock, &locked); });
  check(total == 120 && least == -119 && lock == 8 && locked == 7, "count");
}

// The last block to be done sums what all have written.
template <bool kFences>
__global__ void last_block_sum(const float* x, float* partial, unsigned* done, float* out) {
  auto* last = shared<unsigned>();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (kFences) __threadfence();
    *last = atomicAdd(done, 1) == gridDim.x - 1;
    if (kFences) __threadfence();
  }
  __syncthreads();
  if (*last && threadIdx.x == 0) *out = sum(partial, gridDim.x);
}

template <bool kFences>
void run_last_block_sum() {
  const std::vector<float> x = iota(20);
  std::vector<float> partial(20);
  unsigned done = 0;
  float out = 0;
  emulator::launch("last_block_sum", 20, 32, 1, sizeof(unsigned),
                   [&] { last_block_sum<kFences>(x.data(), partial.data(), &done, &out); });
  check(out == 190, "last_block_sum");
}

// Each piece is copied while the one before it is summed, by its neighbour. The last group is empty.
enum class CopyMistake { kNone, kReadsEarly, kNoBarrier, kOneBuffer, kOverwrites };
template <typename Piece, CopyMistake kMistake>
__global__ void sum_copies(const Piece* x, int count, float* out) {
  constexpr int kFloats = sizeof(Piece) / sizeof(float);
  const int i = int(threadIdx.x), n = int(blockDim.x);
  const auto piece = [&](int at, int thread) {
    return shared<Piece>() + (kMistake >= CopyMistake::kOneBuffer ? 0 : at % 3 * n) + thread;
  };
  const auto start = [&](int at) {
    if (at < count) __pipeline_memcpy_async(piece(at, i), x + at * n + i, sizeof(Piece));
    __pipeline_commit();
  };
  float total = 0;
  start(0);
  for (int at = 0; at < count; at++) {
    if (kMistake == CopyMistake::kOverwrites) __pipeline_wait_prior(0);
    start(at + 1);
    __pipeline_wait_prior(kMistake == CopyMistake::kReadsEarly ? 2 : 1);
    if (kMistake != CopyMistake::kNoBarrier) __syncthreads();
    total += sum(reinterpret_cast<const float*>(piece(at, (i + 1) % n)), kFloats);
    __syncthreads();
  }
  __pipeline_wait_prior(kMistake == CopyMistake::kReadsEarly ? 0 : 1);
  out[i] = total;
}

template <typename Piece, CopyMistake kMistake = CopyMistake::kNone>
void run_sum_copies() {
  const int n = 64, count = 5, floats = sizeof(Piece) / sizeof(float);
  std::vector<Piece> x(n * count);
  float* const values = reinterpret_cast<float*>(x.data());
  for (int i = 0; i < n * count * floats; i++) values[i] = float(i);
  std::vector<float> out(n);
  emulator::launch("sum_copies", 1, n, 1, 3 * n * sizeof(Piece),
                   [&] { sum_copies<Piece, kMistake>(x.data(), count, out.data()); });
  for (int i = 0; i < n; i++) {
    float expected = 0;
    for (int at = 0; at < count; at++) expected += sum(values + (at * n + (i + 1) % n) * floats, floats);
    check(out[i] == expected, "sum_copies");
  }
}

void run_from_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; i++) threads.emplace_back([] { run_block_sum<64>(); });
  for (std::thread& thread : threads) thread.join();
}

// 256 threads with one barrier and five shuffles each.
void time_blocks() {
  const unsigned blocks = 4000;
  const std::vector<float> x = iota(256);
  std::vector<float> out(blocks);
  const auto start = std::chrono::steady_clock::now();
  emulator::launch("speed", blocks, 256, 1, 1024, [&] {
    const float value = warp_sum(x[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = value;
  });
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  std::printf("%.1f µs a block\n", time.count() / blocks);
}

// ---- with a mistake ----

template <bool kFirst, bool kSecond>
__global__ void neighbours(float* out) {
  float* values = shared<float>();
  const unsigned i = threadIdx.x, n = blockDim.x;
  values[i] = float(i);
  if (kFirst) __syncthreads();
  const float value = values[(i + 1) % n] + values[(i + n - 1) % n];
  if (kSecond) __syncthreads();
  values[i] = value;  // used again
  __syncthreads();
  out[i] = values[n - 1 - i];
}

template <bool kFirst, bool kSecond>
void run_neighbours() {
  const unsigned n = 64;
  std::vector<float> out(n);
  emulator::launch("neighbours", 1, n, 1, n * sizeof(float), [&] { neighbours<kFirst, kSecond>(out.data()); });
  for (unsigned i = 0; i < n; i++) {
    const unsigned j = n - 1 - i;
    check(out[i] == float((j + 1) % n + (j + n - 1) % n), "neighbours");
  }
}

// What a shuffle does not do: order memory.
template <bool kSync>
__global__ void through_shared(float* out) {
  float* values = shared<float>();
  values[threadIdx.x] = float(threadIdx.x);
  const unsigned other = __shfl_xor_sync(0xffffffff, threadIdx.x, 1);
  if (kSync) __syncwarp();
  out[threadIdx.x] = values[other];
}

template <bool kSync>
void run_through_shared() {
  std::vector<float> out(32);
  emulator::launch("through_shared", 1, 32, 1, 128, [&] { through_shared<kSync>(out.data()); });
  for (unsigned i = 0; i < 32; i++) check(out[i] == float(i ^ 1), "through_shared");
}

template <typename F>
std::function<void()> kernel(unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes, F body) {
  return [=] { emulator::launch("mistake", blocks, threads, cluster, shared_bytes, body); };
}

volatile float sink;

alignas(16) float copied[64];

void copy_own() {
  __pipeline_memcpy_async(shared<float>() + threadIdx.x, copied + threadIdx.x, 4);
}

void launch_sizes(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes) {
  emulator::launch("mistake", grid, block, cluster, shared_bytes, [] {});
}

const std::map<std::string, std::function<void()>> kCases = {
    {"block_sum", [] { run_block_sum<32>(), run_block_sum<256>(); }},
    {"block_sum_of_1024_threads", [] { run_block_sum<1024>(); }},
    {"sum_of_8",
     [] {
       run_sum_of_8<float>(), run_sum_of_8<double>(), run_sum_of_8<int>(), run_sum_of_8<unsigned>();
       run_sum_of_8<long long>(), run_sum_of_8<unsigned long long>(), run_sum_of_8<int64_t>();
     }},
    {"warp_votes", run_warp_votes},
    {"cluster_sum", run_cluster_sum},
    {"pass_on", run_pass_on<>},
    {"transpose", run_transpose},
    {"count", run_count},
    {"last_block_sum", run_last_block_sum<true>},
    {"from_threads", run_from_threads},
    {"neighbours", run_neighbours<true, true>},
    {"through_shared", run_through_shared<true>},
    {"sum_copies", [] { run_sum_copies<float>(), run_sum_copies<uint2>(), run_sum_copies<uint4>(); }},
    {"time", time_blocks},

    {"missing_barrier", run_neighbours<false, true>},
    {"missing_barrier_before_reuse", run_neighbours<true, false>},
    {"missing_syncwarp", run_through_shared<false>},
    {"missing_fences", run_last_block_sum<false>},
    {"blocks_write_one_address",
     [] {
       int out = 0;
       emulator::launch("mistake", 2, 32, 1, 0, [&] {
         __syncthreads();
         if (threadIdx.x == 0) out = int(blockIdx.x);
         __syncthreads();
       });
     }},
    {"barrier_in_a_branch", kernel(1, 64, 1, 0,
                                   [] {
                                     if (threadIdx.x < 40) __syncthreads();
                                   })},
    {"barrier_and_cluster_barrier", kernel(1, 64, 1, 0,
                                           [] {
                                             if (threadIdx.x < 40) {
                                               __syncthreads();
                                             } else {
                                               cluster_sync();
                                             }
                                           })},
    {"shuffle_in_a_branch", kernel(1, 32, 1, 0,
                                   [] {
                                     if (threadIdx.x < 16) warp_sum(1);
                                   })},
    {"shuffle_and_barrier", kernel(1, 32, 1, 0,
                                   [] {
                                     if (threadIdx.x < 16) warp_sum(1);
                                     __syncthreads();
                                   })},
    {"shuffle_after_exit", kernel(1, 64, 1, 0,
                                  [] {
                                    if (threadIdx.x == 9) return;
                                    if (threadIdx.x >= 32) __syncwarp();
                                    if (threadIdx.x < 16) __syncwarp(0xfdff);
                                    if (threadIdx.x < 32) __syncwarp();
                                  })},
    {"shuffle_in_a_partial_warp", kernel(1, 20, 1, 0, [] { warp_sum(1); })},
    {"own_lane_not_in_mask", kernel(1, 32, 1, 0, [] { __syncwarp(0xffff); })},
    {"source_not_in_mask", kernel(1, 32, 1, 0,
                                  [] {
                                    if (threadIdx.x < 16) __shfl_sync(0xffff, 1, 20);
                                  })},
    {"different_operations", kernel(1, 32, 1, 0,
                                    [] {
                                      if (threadIdx.x % 2) {
                                        __shfl_xor_sync(0xffffffff, 1, 1);
                                      } else {
                                        __ballot_sync(0xffffffff, 1);
                                      }
                                    })},
    {"different_widths", kernel(1, 32, 1, 0, [] { __shfl_xor_sync(0xffffffff, 1, 1, threadIdx.x % 2 ? 8 : 16); })},
    {"different_sizes", kernel(1, 32, 1, 0,
                               [] {
                                 if (threadIdx.x % 2) {
                                   __shfl_xor_sync(0xffffffff, 1.f, 1);
                                 } else {
                                   __shfl_xor_sync(0xffffffff, 1., 1);
                                 }
                               })},
    {"bad_width", kernel(1, 32, 1, 0, [] { __shfl_xor_sync(0xffffffff, 1, 1, 12); })},
    {"shared_overflow", kernel(1, 32, 1, 31 * sizeof(float), [] { shared<float>()[threadIdx.x] = 1; })},
    {"global_overflow",
     [] {
       std::vector<float> x(31);
       emulator::launch("mistake", 1, 32, 1, 0, [&] { sink = __ldg(x.data() + threadIdx.x); });
     }},
    {"uninitialised_shared",
     [] {
       float out = 0;
       emulator::launch("mistake", 1, 32, 1, 128, [&] {
         if (threadIdx.x != 7) shared<float>()[threadIdx.x] = 1;
         __syncthreads();
         if (threadIdx.x == 0) out = sum(shared<float>(), 32);
       });
       check(out == 31, "uninitialised_shared");
     }},
    {"misaligned_load",
     kernel(1, 32, 1, 256, [] { sink = float(__ldcs(reinterpret_cast<uint4*>(shared<float>() + 2)).x); })},
    {"misaligned_store",
     kernel(1, 32, 1, 256, [] { __stcs(reinterpret_cast<uint2*>(shared<float>() + 1), uint2{1, 2}); })},
    {"misaligned_dereference",
     kernel(1, 32, 1, 256, [] { sink = float(reinterpret_cast<uint4*>(shared<float>() + 1)->x); })},
    {"cluster_barrier_in_a_branch", kernel(4, 32, 4, 0,
                                           [] {
                                             if (blockIdx.x != 2) cluster_sync();
                                           })},
    {"cluster_arrive_twice", kernel(2, 32, 2, 0, [] { __cluster_barrier_arrive(), __cluster_barrier_arrive(); })},
    {"cluster_arrive_alone", kernel(2, 32, 2, 0, [] { __cluster_barrier_arrive(); })},
    {"cluster_wait_alone", kernel(2, 32, 2, 0, [] { __cluster_barrier_wait(); })},
    {"missing_cluster_barrier", kernel(2, 32, 2, 128,
                                       [] {
                                         shared<float>()[threadIdx.x] = 1;
                                         sink = *static_cast<float*>(__cluster_map_shared_rank(
                                             shared<float>() + threadIdx.x, 1 - __clusterRelativeBlockRank()));
                                         cluster_sync();
                                       })},
    // One block may exit before the other reads from it.
    {"exit_before_remote_read",
     [] {
       std::vector<float> out(64);
       emulator::launch("mistake", 2, 32, 2, 128, [&] {
         shared<float>()[threadIdx.x] = 1;
         const auto* other = static_cast<const float*>(
             __cluster_map_shared_rank(shared<float>() + threadIdx.x, 1 - __clusterRelativeBlockRank()));
         cluster_sync();
         if (blockIdx.x == 0) __syncthreads();
         if (blockIdx.x == 0) out[threadIdx.x] = *other;
       });
       check(sum(out.data(), 32) == 32, "exit_before_remote_read");
     }},
    {"map_after_exit", kernel(2, 32, 2, 128,
                              [] {
                                if (blockIdx.x == 0) return;
                                __syncthreads();
                                __cluster_map_shared_rank(shared<float>(), 0);
                              })},
    {"message_in_one_place", run_pass_on<MessageMistake::kOnePlace>},
    {"message_not_waited_for", run_pass_on<MessageMistake::kNoWait>},
    {"message_too_many", run_pass_on<MessageMistake::kTooMany>},
    {"message_to_no_mbarrier", kernel(2, 32, 2, 512,
                                      [] {
                                        const float value = 1;
                                        emulator::store_async(__cluster_map_shared_rank(shared<float>(), 0), &value, 4,
                                                              __cluster_map_shared_rank(shared<float>() + 4, 0));
                                      })},
    {"mbarrier_in_global", kernel(1, 32, 1, 128,
                                  [] {
                                    static uint64_t barrier;
                                    emulator::mbarrier_init(&barrier, 1);
                                  })},
    {"bad_rank", kernel(2, 32, 2, 128, [] { __cluster_map_shared_rank(shared<float>(), 2); })},
    {"map_of_global", kernel(2, 32, 2, 128, [] { __cluster_map_shared_rank(&threadIdx, 0); })},
    {"copy_read_early", run_sum_copies<uint4, CopyMistake::kReadsEarly>},
    {"copy_without_barrier", run_sum_copies<uint4, CopyMistake::kNoBarrier>},
    {"copy_over_what_is_read", run_sum_copies<uint4, CopyMistake::kOverwrites>},
    {"copy_over_copy", run_sum_copies<uint4, CopyMistake::kOneBuffer>},
    {"copy_without_wait", kernel(1, 32, 1, 128, [] { copy_own(), __pipeline_commit(); })},
    {"copy_without_commit", kernel(1, 32, 1, 128, [] { copy_own(), __pipeline_wait_prior(0); })},
    {"copy_of_12_bytes", kernel(1, 32, 1, 384, [] { __pipeline_memcpy_async(shared<char>(), copied, 12); })},
    {"copy_to_global", kernel(1, 32, 1, 128, [] { __pipeline_memcpy_async(copied, copied + 32, 4); })},
    {"misaligned_copy", kernel(1, 32, 1, 128, [] { __pipeline_memcpy_async(shared<float>(), copied + 1, 16); })},
    {"copy_overflow",
     [] {
       std::vector<float> x(31);
       emulator::launch("mistake", 1, 32, 1, 128, [&] {
         __pipeline_memcpy_async(shared<float>() + threadIdx.x, x.data() + threadIdx.x, 4);
         __pipeline_commit();
         __pipeline_wait_prior(0);
       });
     }},
    {"large_block", [] { launch_sizes(1, dim3(32, 33), 1, 0); }},
    {"empty_grid", [] { launch_sizes(0, 32, 1, 0); }},
    {"large_cluster", [] { launch_sizes(32, 32, 32, 0); }},
    {"cluster_above_maximum", [] { emulator::properties().max_cluster = 8, launch_sizes(16, 32, 16, 0); }},
    {"grid_not_of_clusters", [] { launch_sizes(6, 32, 4, 0); }},
    {"much_shared_memory", [] { launch_sizes(1, 32, 1, 232449); }},
    {"outside", [] { __syncthreads(); }},
    {"nested", kernel(1, 32, 1, 0, [] { launch_sizes(1, 32, 1, 0); })},
};

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; i++) kCases.at(names[i])();
}

// From what each thread has of a row to what the row has: through the lanes of a warp, the warps of a block, the blocks
// of a cluster. The order is fixed, so the bits of a result are too.
#pragma once

#include "row.cuh"

namespace ce::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxThreads = 256;  // of a block

// Blocks that a multiprocessor is to hold at a time, which bounds the registers of a thread: as many as there are on
// every chip without spilling. `kBurden` counts what a kernel does besides one pass of exponentials.
template <typename T, int kBurden>
constexpr int kBlocks = sizeof(T) == 8 ? (kBurden > 0 ? 1 : 2)
                        : kBurden > 1  ? 2
                                       : 4 - kBurden;

// Calls f(distance) for the distances of a butterfly among `width` neighbouring lanes.
template <typename F>
CE_DEVICE void for_each_distance(int width, F&& f) {
  CE_UNROLL for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    if (distance < width) {
      f(distance);
    }
  }
}

template <typename V>
CE_DEVICE V sum_of_lanes(V value, int width) {
  for_each_distance(width, [&](int distance) { value += __shfl_xor_sync(kAllLanes, value, distance); });
  return value;
}

template <typename V>
CE_DEVICE V max_of_lanes(V value, int width) {
  for_each_distance(width,
                    [&](int distance) { value = std::fmax(value, __shfl_xor_sync(kAllLanes, value, distance)); });
  return value;
}

// Of `width` neighbouring lanes, for each of them: a power of two up to a warp. `kGeneral` tells whether anything but
// the exponentials is summed.
template <bool kGeneral, typename A>
CE_DEVICE RowState<A> sum_of_lanes(RowState<A> state, int width) {
  state.raise(max_of_lanes(state.exps.max, width));
  state.exps.sum = sum_of_lanes(state.exps.sum, width);
  if constexpr (kGeneral) {
    state.linear = sum_of_lanes(state.linear, width);
    state.coefficients = sum_of_lanes(state.coefficients, width);
  }
  return state;
}

template <bool kGeneral, typename A>
CE_DEVICE RowStats<A> sum_of_lanes(RowStats<A> stats, int width) {
  stats.moment = stats.moment.relative_to(max_of_lanes(stats.state.exps.max, width), stats.state.exps);
  stats.moment.sum = sum_of_lanes(stats.moment.sum, width);
  stats.state = sum_of_lanes<kGeneral>(stats.state, width);
  for_each_distance(width, [&](int distance) {
    const RowPlace<A>& mine = stats.place;
    stats.place =
        mine.merge({__shfl_xor_sync(kAllLanes, mine.max, distance), __shfl_xor_sync(kAllLanes, mine.argmax, distance),
                    __shfl_xor_sync(kAllLanes, mine.rank, distance)});
  });
  return stats;
}

template <bool kGeneral, typename A>
CE_DEVICE RowDivergence<A> sum_of_lanes(RowDivergence<A> row, int width) {
  row.raise(max_of_lanes(row.of.max, width), max_of_lanes(row.from.max, width));
  row.of.sum = sum_of_lanes(row.of.sum, width);
  row.from.sum = sum_of_lanes(row.from.sum, width);
  row.cross = sum_of_lanes(row.cross, width);
  return row;
}

// Shared memory that the reduction needs, in states.
template <typename Walk>
CE_HOST_DEVICE int shared_states(const Plan& plan) {
  return Walk::kSize > 1 ? plan.threads / kWarp + 1 : plan.threads;
}

// Of all threads that share a row in this block, for each of them. All threads of the block have to call it. It orders
// memory: what they have read of the row before may be overwritten after.
template <typename Walk, bool kGeneral, typename State>
CE_DEVICE State sum_in_block(State state, const Plan& plan, State* shared) {
  const int thread = threadIdx.x;
  if constexpr (Walk::kSize > 1) {
    state = sum_of_lanes<kGeneral>(state, plan.lanes < kWarp ? plan.lanes : kWarp);
    const int warps = plan.lanes / kWarp;  // a power of two, or 0
    if (warps > 1) {
      if (thread % kWarp == 0) {
        shared[thread / kWarp] = state;
      }
      __syncthreads();
      state = sum_of_lanes<kGeneral>(shared[thread & (warps - 1)], warps);
      __syncthreads();
    } else {
      __syncwarp();
    }
  } else if (plan.lanes > 1) {
    const int rows = plan.rows();
    shared[thread] = state;
    for (int threads = plan.threads / 2; threads >= rows; threads /= 2) {
      __syncthreads();
      if (thread < threads) {
        shared[thread] = shared[thread].merge(shared[thread + threads]);
      }
    }
    __syncthreads();
    state = shared[thread & (rows - 1)];
    __syncthreads();
  }
  return state;
}

// Of the blocks of a cluster, whose one row it is, for each of their threads. Until leave_cluster() nobody ends or
// writes its part again.
template <bool kGeneral, typename State>
CE_DEVICE State sum_in_cluster(State state, const Plan& plan, State* shared) {
  State* const mine = shared + plan.threads / kWarp;
  if (threadIdx.x == 0) {
    *mine = state;
  }
  cluster_barrier();
  state = sum_of_lanes<kGeneral>(*in_block(mine, threadIdx.x & (plan.blocks - 1)), plan.blocks);
  cluster_arrive_relaxed();  // it has only read
  return state;
}
CE_DEVICE void leave_cluster() {
  cluster_wait();
}

}  // namespace ce::cuda

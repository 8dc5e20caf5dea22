// From what each thread has of a row to what the row has: through the lanes of a warp, the warps of a block, the blocks
// of a cluster. The order is fixed, so the bits of a result are too.
#pragma once

#include "cluster.cuh"
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

// The same for rows whose blocks have nothing else to do with each other, without a barrier: each warp sends what it
// has to all blocks, and each warp adds up what has come to its own.
template <typename A>
class Exchange {
 public:
  CE_HOST_DEVICE static int64_t bytes(const Plan& plan) {
    return plan.cluster ? sizeof(Header) + 2 * parts(plan) * sizeof(MaxSum<A>) : 0;
  }

  // All threads of the cluster have to call it, and so they have to call sum() in each turn.
  CE_DEVICE Exchange(void* shared, const Plan& plan)
      : arrivals_(static_cast<Arrivals*>(shared)),
        parts_(reinterpret_cast<MaxSum<A>*>(static_cast<char*>(shared) + sizeof(Header))) {
    if (plan.cluster) {
      open_arrivals(arrivals_, bytes_of_turn(plan));
    }
  }

  CE_DEVICE MaxSum<A> sum(RowState<A> state, const Plan& plan, const Seat& seat) {
    state = sum_of_lanes<false>(state, kWarp);
    if (turn_ == 0) {
      cluster_wait();
    }
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = plan.threads / kWarp;
    // All have read the part that was here two turns ago: otherwise their warps would not all have sent another since,
    // each after all its lanes have read.
    MaxSum<A>* const of_turn = parts_ + turn_ % 2 * parts(plan);
    __syncwarp();
    if (lane < plan.blocks) {
      send(state.exps, of_turn + seat.block * warps + warp, arrivals_, lane);
    }
    wait_for_arrivals(arrivals_, turn_ % 2);
    if (threadIdx.x == 0) {
      expect_arrivals(arrivals_, bytes_of_turn(plan));
    }
    ++turn_;
    state = RowState<A>();
    CE_NO_UNROLL for (int part = lane; part < parts(plan); part += kWarp) {
      state.exps = state.exps.merge(of_turn[part]);
    }
    return sum_of_lanes<false>(state, kWarp).exps;
  }

 private:
  struct alignas(16) Header {
    Arrivals arrivals;
  };

  CE_HOST_DEVICE static int parts(const Plan& plan) { return plan.blocks * (plan.threads / kWarp); }
  CE_DEVICE static int bytes_of_turn(const Plan& plan) { return parts(plan) * sizeof(MaxSum<A>); }

  Arrivals* arrivals_;
  MaxSum<A>* parts_;
  int turn_ = 0;
};

}  // namespace ce::cuda

// Kernels that sum over all rows, or over what the blocks of another kernel have summed up. By one block, the blocks of
// a cluster, or blocks whose sums a second kernel adds; always in a fixed order.

#include "sums.cuh"

namespace ce::cuda {
namespace {

constexpr int kSumThreads = 512;
// Rows that one block sums, and a cluster.
constexpr int64_t kOneBlock = 1 << 11;
constexpr int64_t kOneCluster = 1 << 17;
constexpr int kCluster = 8;

// What a row adds to the sums, as it is read.
template <typename A>
struct RowValues {
  int64_t target = 0;
  A loss = 0;
};

template <typename A, typename P>
CE_DEVICE RowValues<A> read_row(const P& p, int64_t row, bool losses, bool weights) {
  RowValues<A> values;
  if (losses) {
    // Without row weights any order will do.
    values.loss = static_cast<const A*>(p.loss)[p.row_weight.data ? row_offset(p, row, p.row_strides) : row];
  }
  if (weights) {
    values.target = index_of(p, row);
  }
  return values;
}

template <typename A, typename P>
CE_DEVICE RowSums sums_of(const P& p, int64_t row, const RowValues<A>& values, bool losses, bool weights) {
  const A row_weight = row_value<A>(p, p.row_weight, row, 1);
  RowSums sums;
  if (losses) {
    sums.loss = weighted_loss(row_weight, values.loss);
  }
  if (weights) {
    sums.weight = weight_of_row(p, row_weight, values.target);
  }
  return sums;
}

// For the first warp's threads.
CE_DEVICE RowSums sum_in_block(RowSums sums) {
  RowSums* const shared = static_cast<RowSums*>(shared_memory());
  sums = sum_in_warp(sums);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = sums;
  }
  __syncthreads();
  return threadIdx.x < kWarp ? sum_in_warp(threadIdx.x < kSumThreads / kWarp ? shared[threadIdx.x] : RowSums()) : sums;
}

// The same of a cluster, for the first block's threads, to which the others send what they have.
class SumOfCluster {
 public:
  CE_DEVICE explicit SumOfCluster(bool is_launched)
      : parts_(static_cast<RowSums*>(shared_memory()) + kSumThreads / kWarp),
        arrivals_(reinterpret_cast<Arrivals*>(parts_ + kCluster)) {
    if (is_launched) {
      open_arrivals(arrivals_, kCluster * sizeof(RowSums));
    }
  }

  CE_DEVICE RowSums sum(const RowSums& of_block) const {
    cluster_wait();
    if (threadIdx.x == 0) {
      send(of_block, parts_ + blockIdx.x, arrivals_, 0);
    }
    if (blockIdx.x > 0 || threadIdx.x >= kWarp) {
      return of_block;
    }
    wait_for_arrivals(arrivals_, 0);
    return sum_in_warp(threadIdx.x < kCluster ? parts_[threadIdx.x] : RowSums());
  }

 private:
  RowSums* parts_;
  Arrivals* arrivals_;
};

// Adds up take(i, read(i)) for a thread's part of `count`, which are taken in turn by so many threads. What it reads is
// under way together.
template <typename Read, typename Take>
CE_DEVICE RowSums sum_turns(int64_t thread, int64_t threads, int64_t count, Read&& read, Take&& take) {
  constexpr int kBatch = 8;
  RowSums sums;
  for (int64_t first = thread; first < count; first += kBatch * threads) {
    decltype(read(first)) batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (first + i * threads < count) {
        batch[i] = read(first + i * threads);
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (first + i * threads < count) {
        add(sums, take(first + i * threads, batch[i]));
      }
    }
  }
  return sums;
}

template <typename A, typename P>
__global__ void __launch_bounds__(kSumThreads)
    sum_all_rows(const __grid_constant__ P p, const __grid_constant__ bool losses, const __grid_constant__ bool weights,
                 const __grid_constant__ bool cluster) {
  const SumOfCluster of_cluster(cluster);
  wait_for_previous();
  let_next_start();
  RowSums sums = sum_turns(
      static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, static_cast<int64_t>(gridDim.x) * kSumThreads,
      p.rows, [&](int64_t row) { return read_row<A>(p, row, losses, weights); },
      [&](int64_t row, const RowValues<A>& values) { return sums_of(p, row, values, losses, weights); });
  sums = sum_in_block(sums);
  if (cluster) {
    sums = of_cluster.sum(sums);
  }
  if (threadIdx.x == 0) {
    if (!cluster && gridDim.x > 1) {
      Workspace(p.workspace).sums()[blockIdx.x] = sums;
    } else if (blockIdx.x == 0) {
      write_sums<A>(p, sums, losses, weights);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    sum_partial(const __grid_constant__ Problem p, const __grid_constant__ int blocks,
                const __grid_constant__ bool losses, const __grid_constant__ bool weights) {
  wait_for_previous();
  let_next_start();
  const RowSums* const partial = Workspace(p.workspace).sums();
  const RowSums sums = sum_in_block(sum_turns(
      threadIdx.x, kSumThreads, blocks, [&](int64_t block) { return partial[block]; },
      [](int64_t, const RowSums& of_block) { return of_block; }));
  if (threadIdx.x == 0) {
    write_sums<A>(p, sums, losses, weights);
  }
}

constexpr int64_t kShared = (kSumThreads / kWarp + kCluster) * sizeof(RowSums) + sizeof(Arrivals);

template <typename A>
void sum_blocks(const Problem& p, int blocks, bool losses, bool weights, Stream stream) {
  launch(sum_partial<A>, {1, kSumThreads, 1, kShared, /*early=*/true}, stream, p, blocks, losses, weights);
}

template <typename A, typename P>
void launch_sum_rows(const P& p, bool losses, bool weights, Stream stream) {
  const bool cluster = p.rows > kOneBlock && p.rows <= kOneCluster && current_device().max_cluster >= kCluster;
  const int blocks = p.rows <= kOneBlock ? 1 : cluster ? kCluster : kSumBlocks;
  const Grid grid{blocks, kSumThreads, cluster ? kCluster : 1, kShared, /*early=*/true};
  launch(sum_all_rows<A, P>, grid, stream, p, losses, weights, cluster);
  if (blocks > 1 && !cluster) {
    sum_blocks<A>(p, blocks, losses, weights, stream);
  }
}

}  // namespace

void sum_tiles(const Problem& p, int tiles, Stream stream) {
  const bool weights = p.divides_by_weight && !p.grad.data;
  p.dtype == DType::kFloat64 ? sum_blocks<double>(p, tiles, /*losses=*/true, weights, stream)
                             : sum_blocks<float>(p, tiles, /*losses=*/true, weights, stream);
}

void sum_rows(const Problem& p, bool losses, Stream stream) {
  // A gradient in the forward pass has needed the divisor before.
  const bool weights = p.divides_by_weight && !(losses && p.grad.data);
  if (p.dtype == DType::kFloat64) {
    launch_sum_rows<double>(p, losses, weights, stream);
  } else {
    dispatch_plain<float>(p, [&](const auto& problem) { launch_sum_rows<float>(problem, losses, weights, stream); });
  }
}

int64_t workspace_size(const Problem& p) {
  const bool keeps_rows = p.grad.data && !p.max && has_gradient_pass(p, plan_forward(p, current_device()));
  return Workspace::kRows + (keeps_rows ? Workspace::bytes_of_rows(p.rows) : 0);
}

}  // namespace ce::cuda

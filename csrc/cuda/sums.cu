// Sums over all rows: the loss, and the class weights that a mean divides by. By one block, the blocks of a cluster, or
// blocks whose sums a second kernel adds; always in a fixed order.

#include "reduce.cuh"
#include "target.cuh"

namespace ce::cuda {
namespace {

constexpr int kSumThreads = 512;
// Rows that one block sums, and a cluster.
constexpr int64_t kOneBlock = 1 << 11;
constexpr int64_t kOneCluster = 1 << 17;
constexpr int kCluster = 8;

template <typename A>
CE_DEVICE RowSums sums_of(const Problem& p, int64_t row, bool losses, bool weights) {
  RowSums sums;
  const A row_weight = row_value<A>(p, p.row_weight, row, 1);
  if (losses) {
    // Without row weights any order will do.
    const int64_t offset = p.row_weight.data ? row_offset(p, row, p.row_strides) : row;
    sums.loss = row_weight * static_cast<const A*>(p.loss)[offset];
  }
  if (weights && !has_indices(p)) {
    sums.weight = row_weight;
  } else if (weights) {
    const int64_t target = read_target(p, row);
    sums.weight = judge(p, target) == Verdict::kKept ? row_weight * weight_of_target<A>(p, target) : A(0);
  }
  return sums;
}

CE_DEVICE void add(RowSums& to, const RowSums& sums) {
  to.loss += sums.loss;
  to.weight += sums.weight;
}

CE_DEVICE RowSums sum_in_warp(RowSums sums) {
  return {sum_of_lanes(sums.loss, kWarp), sum_of_lanes(sums.weight, kWarp)};
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

// The same of a cluster.
CE_DEVICE RowSums sum_in_cluster(RowSums sums) {
  RowSums* const mine = static_cast<RowSums*>(shared_memory()) + kSumThreads / kWarp;
  if (threadIdx.x == 0) {
    *mine = sums;
  }
  cluster_barrier();
  if (threadIdx.x < kWarp) {
    sums = sum_in_warp(threadIdx.x < kCluster ? *in_block(mine, threadIdx.x) : RowSums());
  }
  cluster_barrier();  // nobody leaves before all have read
  return sums;
}

template <typename A>
CE_DEVICE void write(const Problem& p, const RowSums& sums, bool losses, bool weights) {
  A* const divisor = Workspace(p.workspace).template divisor<A>();
  if (weights) {
    *divisor = static_cast<A>(divisor_of_mean(sums.weight, p));
  }
  if (losses) {
    const bool is_known = !p.divides_by_weight && !p.divisor.data;  // to more digits than A may have
    store_from_double(sums.loss / (is_known ? p.divisor.value : double(divisor_of<A>(p))), p.total, p.total_type);
  }
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    sum_all_rows(const __grid_constant__ Problem p, const __grid_constant__ bool losses,
                 const __grid_constant__ bool weights, const __grid_constant__ bool cluster) {
  constexpr int kBatch = 8;  // rows that a thread has under way together
  wait_for_previous();
  RowSums sums;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; first < p.rows;
       first += kBatch * threads) {
    RowSums batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (first + i * threads < p.rows) {
        batch[i] = sums_of<A>(p, first + i * threads, losses, weights);
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      add(sums, batch[i]);
    }
  }
  sums = sum_in_block(sums);
  if (cluster) {
    sums = sum_in_cluster(sums);
  }
  if (threadIdx.x == 0) {
    if (!cluster && gridDim.x > 1) {
      Workspace(p.workspace).sums()[blockIdx.x] = sums;
    } else if (blockIdx.x == 0) {
      write<A>(p, sums, losses, weights);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    sum_blocks(const __grid_constant__ Problem p, const __grid_constant__ int blocks,
               const __grid_constant__ bool losses, const __grid_constant__ bool weights) {
  wait_for_previous();
  const RowSums* const partial = Workspace(p.workspace).sums();
  const RowSums sums = sum_in_block(static_cast<int>(threadIdx.x) < blocks ? partial[threadIdx.x] : RowSums());
  if (threadIdx.x == 0) {
    write<A>(p, sums, losses, weights);
  }
}

template <typename A>
void sum_rows(const Problem& p, bool losses, bool weights, Stream stream) {
  const bool cluster = p.rows > kOneBlock && p.rows <= kOneCluster && current_device().max_cluster >= kCluster;
  const int blocks = p.rows <= kOneBlock ? 1 : cluster ? kCluster : kSumBlocks;
  constexpr int64_t kShared = (kSumThreads / kWarp + 1) * sizeof(RowSums);
  const Grid grid{blocks, kSumThreads, cluster ? kCluster : 1, kShared, /*early=*/true};
  launch(sum_all_rows<A>, grid, stream, p, losses, weights, cluster);
  if (blocks > 1 && !cluster) {
    launch(sum_blocks<A>, {1, kSumThreads, 1, kShared, /*early=*/true}, stream, p, blocks, losses, weights);
  }
}

}  // namespace

void sum_rows(const Problem& p, bool losses, Stream stream) {
  // A gradient in the forward pass has needed the divisor before.
  const bool weights = p.divides_by_weight && !(losses && p.grad.data);
  p.dtype == DType::kFloat64 ? sum_rows<double>(p, losses, weights, stream)
                             : sum_rows<float>(p, losses, weights, stream);
}

int64_t workspace_size(const Problem& p) {
  return Workspace::kParts + kMaxParts * state_size(p);
}

}  // namespace ce::cuda

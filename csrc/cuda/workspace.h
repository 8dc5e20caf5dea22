// How a call's workspace is laid out.
#pragma once

#include <cstddef>

#include "../row_loss.h"

namespace ce::cuda {

constexpr int kSumBlocks = 128;     // that share a sum over rows
constexpr int kMaxTiles = 1 << 12;  // of rows whose sums they leave here
constexpr int kRowValues = 5;       // max, sum, teacher_max, teacher_sum, mean
constexpr int kMaxParts = 1 << 12;  // of rows that blocks share without a cluster, rows times blocks

constexpr int64_t kLargestState = 64;  // bytes of a row's state

// What is summed over rows.
struct RowSums {
  double loss = -0.0;  // the identity of addition, so that a total of losses of −0 is −0
  double weight = 0;
};

class Workspace {
 public:
  CE_HOST_DEVICE explicit Workspace(void* data) : data_(static_cast<char*>(data)) {}

  template <typename A>
  CE_HOST_DEVICE A* divisor() const {
    return reinterpret_cast<A*>(data_);
  }
  CE_HOST_DEVICE RowSums* sums() const { return reinterpret_cast<RowSums*>(data_ + kSums); }
  // Of each row, from the blocks that share it.
  template <typename State>
  CE_HOST_DEVICE State* parts() const {
    return reinterpret_cast<State*>(data_ + kParts);
  }
  // (kRowValues, rows) of what a gradient in a pass of its own is made from.
  template <typename A>
  CE_HOST_DEVICE A* rows() const {
    return reinterpret_cast<A*>(data_ + kRows);
  }

  static constexpr int64_t bytes_of_rows(int64_t rows) {
    return rows * kRowValues * static_cast<int64_t>(sizeof(double));
  }

  static constexpr int64_t kSums = 16;
  static constexpr int64_t kParts = kSums + kMaxTiles * sizeof(RowSums);
  static constexpr int64_t kRows = kParts + kMaxParts * kLargestState;

 private:
  char* data_;
};

}  // namespace ce::cuda

// Where the picks of a problem's rows lie, and what the kernels keep of them.
#pragma once

#include <cstring>

#include "operands.h"
#include "row_picks.h"

namespace ce {

// The picks of one row.
template <typename A>
struct Picks {
  const Problem& p;
  int64_t target, probabilities;  // offsets of the first
  A* logits;                      // (picks): z
  A* coefficients;                // (picks): q − u, all that their class has
  PickedRow<A>& row;

  CE_HOST_DEVICE Picks(const Problem& p, int64_t row)
      : p(p),
        target(row_offset(p, row, p.target.strides)),
        probabilities(row_offset(p, row, p.probabilities.strides)),
        logits(static_cast<A*>(p.picked) + row * 2 * p.picks),
        coefficients(logits + p.picks),
        row(static_cast<PickedRow<A>*>(p.picked_rows)[row]) {}

  CE_HOST_DEVICE int64_t index(int64_t j) const { return read_index(p, target + j * p.target.class_stride); }
  CE_HOST_DEVICE A probability(int64_t j) const {
    return static_cast<const A*>(p.probabilities.data)[probabilities + j * p.probabilities.class_stride];
  }
  CE_HOST_DEVICE bool is_out_of_bounds(int64_t j) const { return ce::is_out_of_bounds(p, index(j)); }
};

// A class may have been picked more than once. To find out which, each pick leaves its number where its gradient will
// be: what a pick finds there then is the number of one of its class.
template <typename T>
struct PickTag {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

  CE_HOST_DEVICE static void write(T* place, int64_t j) {
    const Bits bits = static_cast<Bits>(j);
    std::memcpy(place, &bits, sizeof(bits));
  }
  CE_HOST_DEVICE static int64_t read(const T* place) {
    Bits bits = 0;
    std::memcpy(&bits, place, sizeof(bits));
    return static_cast<int64_t>(bits);
  }
};

// Where the j-th pick's gradient is in that of its row, and the number that it finds there.
template <typename T>
CE_HOST_DEVICE T* place_of(const Picks<Acc<T>>& picks, T* grad, int64_t j) {
  return grad + picks.index(j) * picks.p.grad.class_stride;
}
template <typename T>
CE_HOST_DEVICE int64_t tag_of(const Picks<Acc<T>>& picks, T* grad, int64_t j) {
  return PickTag<T>::read(place_of(picks, grad, j));
}

// Gives all picks of a class the coefficient of all of them, after they have left their tags.
template <typename T>
CE_HOST_DEVICE void merge_repeated(const Picks<Acc<T>>& picks, T* grad) {
  for (int64_t j = 0; j < picks.p.picks; ++j) {
    if (const int64_t last = tag_of(picks, grad, j); last != j) {
      picks.coefficients[last] += picks.coefficients[j];
    }
  }
  for (int64_t j = 0; j < picks.p.picks; ++j) {
    picks.coefficients[j] = picks.coefficients[tag_of(picks, grad, j)];
  }
}

}  // namespace ce

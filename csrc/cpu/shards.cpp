#include "../operands.h"

namespace ce::cpu {
namespace {

template <typename A>
void merge(const Shards& s) {
  for (int64_t row = 0; row < s.rows; ++row) {
    const RowState<A> state = merge_states(static_cast<const A*>(s.states) + row, s.shards, s.rows);
    static_cast<A*>(s.loss)[row] = state.loss(static_cast<A>(s.z_loss));
    static_cast<A*>(s.max)[row] = state.exps.max;
    static_cast<A*>(s.sum)[row] = state.exps.sum;
    static_cast<A*>(s.coefficients)[row] = state.coefficients;
  }
}

}  // namespace

void merge_shards(const Shards& s) {
  s.is_double ? merge<double>(s) : merge<float>(s);
}

}  // namespace ce::cpu

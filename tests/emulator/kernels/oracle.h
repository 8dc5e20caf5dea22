// What the kernels are to find, in float64: written from the formulas of row_loss.h, row_divergence.h and row_picks.h,
// but without a line of theirs.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "operands.h"

namespace ce::test {

struct Softmax {
  double max = -kInf, sum = 0, lse = 0;
  std::vector<double> p, ln_p;

  explicit Softmax(const std::vector<double>& z) : p(z.size()), ln_p(z.size()) {
    for (const double value : z) {
      max = value > max ? value : max;
    }
    const double reference = max == -kInf ? 0 : max;
    for (size_t k = 0; k < z.size(); ++k) {
      p[k] = std::exp(z[k] - reference);
      sum += p[k];
    }
    for (size_t k = 0; k < z.size(); ++k) {
      p[k] /= sum;
      ln_p[k] = z[k] - reference - std::log(sum);
    }
    lse = max == kInf ? kInf : max + std::log(sum);
  }
};

// A gradient of shape (rows, classes), and for each row how large the terms are that it is made from.
struct Gradient {
  Matrix values;
  std::vector<double> sizes;

  Gradient(int64_t rows, int64_t classes) : values(rows, classes), sizes(rows) {}
};

// A sum, and that of its terms' sizes.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::abs(term);
  }
};

// What the kernels are to find.
class Oracle {
 public:
  Oracle(const Case& c, const Inputs& in)
      : max(c.rows()),
        sum(c.rows()),
        lse(c.rows()),
        loss(c.rows()),
        loss_size(c.rows()),
        log_prob(c.rows()),
        entropy(c.rows()),
        teacher_max(c.rows()),
        teacher_sum(c.rows()),
        mean(c.rows()),
        argmax(c.rows(), -1),
        rank(c.rows(), -1),
        c_(c),
        in_(in),
        scale_(c.logit_scale * (c.on_device ? Inputs::kScaleOnDevice : 1)),
        x_(c.rows(), c.classes),
        p_(c.rows(), c.classes),
        ln_p_(c.rows(), c.classes),
        slope_(c.rows(), c.classes),
        shares_(c.rows(), c.classes),
        by_logits_(c.rows(), c.classes),
        by_target_(c.rows(), c.classes) {
    std::vector<double> z(c.classes);
    for (int64_t row = 0; row < c.rows(); ++row) {
      if ((c.has_teacher() || c.picks > 0) && !in.kept[row]) {
        continue;
      }
      for (int64_t k = 0; k < c.classes; ++k) {
        x_(row, k) = in.logits.get(row, k);
        const double scaled = scale_ * x_(row, k), tanh = c.softcap > 0 ? std::tanh(scaled / c.softcap) : 0;
        z[k] = c.softcap > 0 ? c.softcap * tanh : scaled;
        slope_(row, k) = 1 - tanh * tanh;
      }
      const Softmax softmax(z);
      std::copy(softmax.p.begin(), softmax.p.end(), &p_(row, 0));
      std::copy(softmax.ln_p.begin(), softmax.ln_p.end(), &ln_p_(row, 0));
      max[row] = softmax.max;
      sum[row] = softmax.sum;
      lse[row] = softmax.lse;
      if (c.picks > 0 && !in.bad[row]) {
        pick(row);
      }
      c.has_teacher() ? diverge(row, softmax) : cross(row);
      if (c.z_loss > 0) {
        add_z_loss(row);
      }
      if (c.wants_stats()) {
        find_stats(row);
      }
      loss[row] = !in.kept[row] ? 0 : in.bad[row] ? NAN : loss[row];
    }
    reduce();
  }

  std::vector<double> max, sum, lse, loss, loss_size, log_prob, entropy, teacher_max, teacher_sum, mean;
  std::vector<int64_t> argmax, rank;
  double divisor = 1;
  Sum total;

  Gradient of_logits(const Upstream& upstream) const {
    Gradient gradient(c_.rows(), c_.classes);
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const RowUpstream of_row = upstream_of(row, upstream);
      gradient.sizes[row] = std::abs(scale_) * (std::abs(of_row.loss) * by_logits_.sizes[row] + std::abs(of_row.lse) +
                                                std::abs(of_row.log_prob) +
                                                std::abs(of_row.entropy) * (c_.wants(kEntropy) ? 2 + entropy[row] : 0));
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.values(row, k) = by_z(row, k, of_row) * scale_ * slope_(row, k);
      }
    }
    return gradient;
  }

  // Of the probabilities or of the teacher's logits.
  Gradient of_target(const Upstream& upstream) const {
    Gradient gradient = by_target_;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const double g = in_.kept[row] ? factor(row, upstream) : 0;
      gradient.sizes[row] *= std::abs(g);
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.values(row, k) *= g;
      }
    }
    return gradient;
  }

  // Of the weights of classes that have probabilities.
  std::vector<Sum> of_weight(const Upstream& upstream) const {
    std::vector<Sum> gradient(c_.classes);
    for (int64_t row = 0; row < c_.rows(); ++row) {
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient[k].add(-factor(row, upstream) * smoothed(row, k) * ln_p_(row, k));
      }
    }
    return gradient;
  }

  Sum of_logit_scale(const Upstream& upstream) const {
    Sum gradient;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      const RowUpstream of_row = upstream_of(row, upstream);
      for (int64_t k = 0; k < c_.classes; ++k) {
        gradient.add(by_z(row, k, of_row) * slope_(row, k) * x_(row, k));
      }
    }
    return gradient;
  }

 private:
  // A class's share of the target.
  double smoothed(int64_t row, int64_t k) const {
    const double q = c_.picks > 0             ? shares_(row, k)
                     : c_.has_probabilities() ? in_.target.get(row, k)
                     : k == in_.index[row]    ? 1
                                              : 0;
    return (1 - c_.smoothing) * q + c_.smoothing / c_.classes;
  }

  // The shares of the target, and the part of the loss that does not depend on the logits.
  void pick(int64_t row) {
    double mass = 0;
    Sum constant;
    for (int64_t j = 0; j < c_.picks; ++j) {
      const double q = in_.picked.probabilities.get(row, j);
      mass += q;
      constant.add(q > 0 ? q * std::log(q) : 0);
    }
    const int64_t others = c_.classes - c_.picks;
    const double background = c_.spreads && others > 0 ? std::max(0.0, 1 - mass) / others : 0;
    constant.add(background > 0 ? others * background * std::log(background) : 0);
    std::fill_n(&shares_(row, 0), c_.classes, background);
    for (int64_t j = 0; j < c_.picks; ++j) {
      shares_(row, in_.picked.index(row, j)) += in_.picked.probabilities.get(row, j) - background;
    }
    loss[row] = c_.kappa * constant.value;
    loss_size[row] = c_.kappa * constant.size;
  }

  void cross(int64_t row) {
    Sum sum_a;
    for (int64_t k = 0; k < c_.classes; ++k) {
      const double a = in_.weight.get(k) * smoothed(row, k);
      sum_a.add(a);
      if (a != 0) {
        loss[row] -= a * ln_p_(row, k);
        loss_size[row] += std::abs(a) * (1 + std::abs(ln_p_(row, k)));
      }
      by_logits_.values(row, k) = -a;
      by_target_.values(row, k) = -(1 - c_.smoothing) * in_.weight.get(k) * ln_p_(row, k);
      by_target_.sizes[row] = std::max(by_target_.sizes[row], 1 + std::abs(by_target_.values(row, k)));
    }
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_logits_.values(row, k) += sum_a.value * p_(row, k);
    }
    by_logits_.sizes[row] = sum_a.size;
  }

  // The divergence is of the softmax `a` from `b`, of which one is the teacher's.
  void diverge(int64_t row, const Softmax& softmax) {
    std::vector<double> t(c_.classes);
    for (int64_t k = 0; k < c_.classes; ++k) {
      t[k] = c_.teacher_scale * in_.target.get(row, k);
    }
    const Softmax teacher(t);
    const Softmax &a = c_.reverse ? softmax : teacher, &b = c_.reverse ? teacher : softmax;
    for (int64_t k = 0; k < c_.classes; ++k) {
      // Without rounding where the softmaxes are the same.
      if (a.p[k] != 0 && c_.kappa * a.ln_p[k] != b.ln_p[k]) {
        loss[row] += a.p[k] * (c_.kappa * a.ln_p[k] - b.ln_p[k]);
        loss_size[row] += a.p[k] * (2 + std::abs(a.ln_p[k]) + std::abs(b.ln_p[k]));
      }
    }
    Gradient &by_a = c_.reverse ? by_logits_ : by_target_, &by_b = c_.reverse ? by_target_ : by_logits_;
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_a.values(row, k) = a.p[k] == 0 ? 0 : a.p[k] * (c_.kappa * a.ln_p[k] - b.ln_p[k] - loss[row]);
      by_b.values(row, k) = b.p[k] - a.p[k];
      by_target_.values(row, k) *= c_.teacher_scale;
    }
    by_a.sizes[row] = loss_size[row] + std::abs(loss[row]);
    by_b.sizes[row] = 1;
    by_target_.sizes[row] *= c_.teacher_scale;
    teacher_max[row] = teacher.max;
    teacher_sum[row] = teacher.sum;
    mean[row] = loss[row] + c_.kappa * std::log(a.sum) - std::log(b.sum);
  }

  void add_z_loss(int64_t row) {
    loss[row] += c_.z_loss * lse[row] * lse[row];
    loss_size[row] += c_.z_loss * lse[row] * lse[row];
    const double slope = 2 * c_.z_loss * lse[row];
    by_logits_.sizes[row] += std::abs(slope);
    for (int64_t k = 0; k < c_.classes; ++k) {
      by_logits_.values(row, k) += slope * p_(row, k);
    }
  }

  // The place of a target is one among the logits as they are given, or their reverse under a negative scale.
  void find_stats(int64_t row) {
    const double order = scale_ < 0 ? -1 : 1;
    const int64_t target = in_.index[row];
    log_prob[row] = !in_.kept[row] ? 0 : target < 0 ? NAN : ln_p_(row, target);
    argmax[row] = 0;
    rank[row] = target < 0 ? -1 : 0;
    double largest = -kInf;
    for (int64_t k = 0; k < c_.classes; ++k) {
      const double y = order * x_(row, k);
      if (y > largest) {
        largest = y;
        argmax[row] = k;
      }
      if (target >= 0) {
        const double target_y = order * x_(row, target);
        rank[row] += std::isnan(y) || y > target_y || (y == target_y && k < target);
      }
      entropy[row] -= p_(row, k) == 0 ? 0 : p_(row, k) * ln_p_(row, k);
    }
  }

  void reduce() {
    double weights = 0;
    for (int64_t row = 0; row < c_.rows(); ++row) {
      if (!in_.kept[row]) {
        continue;
      }
      const double row_weight = in_.row_weight.get(row);
      weights += row_weight * (!c_.has_indices() ? 1 : in_.index[row] >= 0 ? in_.weight.get(in_.index[row]) : 0);
      total.value += row_weight * loss[row];
      total.size += row_weight * loss_size[row];
    }
    if (c_.reduction == 'd') {
      divisor = Inputs::kDivisor * (c_.on_device ? in_.divisor.get() : 1);
    } else if (c_.reduction == 'm') {
      divisor = c_.divides_by_weight() ? weights : c_.rows();
      divisor = divisor == 0 && c_.zero_if_empty ? kInf : divisor;
    }
    total.value /= divisor;
    total.size /= divisor;
  }

  // Of a row's loss.
  double factor(int64_t row, const Upstream& upstream) const {
    return in_.bad[row] ? NAN : in_.kept[row] ? upstream.loss.get(row) * in_.row_weight.get(row) / divisor : 0;
  }

  struct RowUpstream {
    double loss, lse, log_prob, entropy;
    bool is_zero;
  };
  RowUpstream upstream_of(int64_t row, const Upstream& upstream) const {
    return {factor(row, upstream), upstream.lse.get(row), in_.kept[row] ? upstream.log_prob.get(row) : 0,
            upstream.entropy.get(row), !in_.kept[row] && !upstream.reaches_ignored_rows()};
  }

  double by_z(int64_t row, int64_t k, const RowUpstream& upstream) const {
    if (upstream.is_zero) {
      return 0;
    }
    const double p = p_(row, k);
    double gradient =
        upstream.loss * by_logits_.values(row, k) + upstream.lse * p + upstream.log_prob * ((k == in_.index[row]) - p);
    if (upstream.entropy != 0 && p != 0) {
      gradient -= upstream.entropy * p * (ln_p_(row, k) + entropy[row]);
    }
    return gradient;
  }

  const Case& c_;
  const Inputs& in_;
  const double scale_;
  Matrix x_, p_, ln_p_, slope_;     // the logits as they are given, their softmax, and ∂z/∂x over the scale
  Matrix shares_;                   // of the target, where it picks classes
  Gradient by_logits_, by_target_;  // of a row's loss alone, the first by z
};

}  // namespace ce::test

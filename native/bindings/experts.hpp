// The experts of a layer as Python holds them: put there one by one, before a layer runs or when it asks for them.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "linears.hpp"
#include "ropewalk/operations.hpp"

namespace ropewalk {

namespace py = pybind11;

class BoundExperts : public ExpertSource {
 public:
  // fetch: None, or called with the numbers that a layer is about to use, ascending, to put there those that are not.
  BoundExperts(int64_t experts, int64_t features, int64_t inner_features, py::object fetch) : fetch_(std::move(fetch)) {
    require(experts > 0 && experts <= kMostExperts, "a layer has 1 to 1024 experts");
    require(features > 0 && features <= kMostFeatures && inner_features > 0 && inner_features <= kMostFeatures / 2,
            "the features of experts are out of range");
    require(fetch_.is_none() || PyCallable_Check(fetch_.ptr()) != 0, "fetch is neither None nor callable");
    num_experts = experts;
    size = features;
    inner = inner_features;
    held_.resize(static_cast<size_t>(experts));
  }

  void put(int64_t number, const py::object& gate_up, const py::object& down) {
    check_number(number);
    require(py::isinstance<LinearGroup>(gate_up) && py::isinstance<LinearGroup>(down), "an expert is two LinearGroups");
    const auto& first = gate_up.cast<const LinearGroup&>();
    const auto& second = down.cast<const LinearGroup&>();
    require(first.in_features() == size && first.out_features() == 2 * inner && second.in_features() == inner &&
                second.out_features() == size,
            "an expert differs in size from the others");
    set(number, std::shared_ptr<const Held>(new Held{{&first.plan(), &second.plan()}, gate_up, down}, &Held::release));
  }

  void drop(int64_t number) {
    check_number(number);
    set(number, nullptr);
  }

  // Called without the GIL, by the thread that holds the runtime's mutex.
  std::vector<std::shared_ptr<const Expert>> take(const std::vector<int64_t>& numbers) const override {
    if (!fetch_.is_none()) {
      const py::gil_scoped_acquire acquire;
      fetch_(numbers);
    }
    std::vector<std::shared_ptr<const Expert>> taken;
    const std::lock_guard lock(mutex_);
    for (const int64_t number : numbers) {
      const auto& held = held_[static_cast<size_t>(number)];
      if (held == nullptr) throw ShapeFailure("expert " + std::to_string(number) + " has not been put there");
      taken.emplace_back(held, &held->expert);
    }
    return taken;
  }

 private:
  // Whoever lets go of it last may not hold the GIL.
  struct Held {
    Expert expert;
    py::object gate_up, down;
    static void release(const Held* held) {
      const py::gil_scoped_acquire acquire;
      delete held;
    }
  };

  void check_number(int64_t number) const {
    if (number >= 0 && number < num_experts) return;
    throw ShapeFailure("there is no expert " + std::to_string(number) + " of " + std::to_string(num_experts));
  }

  // What was there goes when nobody computes with it any more, and not while the lock is held.
  void set(int64_t number, std::shared_ptr<const Held> held) {
    const std::lock_guard lock(mutex_);
    held_[static_cast<size_t>(number)].swap(held);
  }

  py::object fetch_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Held>> held_;
};

}  // namespace ropewalk

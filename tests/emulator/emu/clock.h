// SPDX-License-Identifier: Apache-2.0
//
// Vector clocks: what one thread knows of every other. Event e of agent a happened before thread
// t's present if t's clock holds at least e at a. Agents are the threads, and mbarriers and the
// like, so that asynchronous copies are ordered by exactly what they complete on.
//
// Copied on write: after a barrier all its threads share one clock. A thread's own entry is kept
// beside it (Thread::epoch), since that is the one that changes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace emu {

class Clock {
 public:
  uint32_t operator[](size_t agent) const {
    return at_ != nullptr && agent < at_->size() ? (*at_)[agent] : 0;
  }

  void set(size_t agent, uint32_t value) {
    std::vector<uint32_t>& own = writable(agent + 1);
    own[agent] = value;
  }
  void raise(size_t agent, uint32_t value) {
    if ((*this)[agent] < value) {
      set(agent, value);
    }
  }

  void join(const Clock& other) {
    // The threads that meet at a barrier mostly share one clock: joining it again adds nothing.
    if (other.at_ == nullptr || other.at_ == at_ || other.at_ == joined_) {
      return;
    }
    if (at_ == nullptr) {
      at_ = other.at_;
    } else {
      const std::vector<uint32_t>& theirs = *other.at_;
      uint32_t* own = writable(theirs.size()).data();
      for (size_t i = 0, n = theirs.size(); i < n; ++i) {
        own[i] = std::max(own[i], theirs[i]);
      }
    }
    joined_ = other.at_;
  }
  // The same for a clock that is known to hold all of this one.
  void share(const Clock& other) { at_ = other.at_; }
  void clear() {
    at_.reset();
    joined_.reset();
  }
  bool is_shared_with(const Clock& other) const { return at_ == other.at_; }

 private:
  std::vector<uint32_t>& writable(size_t agents) {
    if (at_ == nullptr) {
      at_ = std::make_shared<std::vector<uint32_t>>();
    } else if (at_.use_count() > 1) {
      at_ = std::make_shared<std::vector<uint32_t>>(*at_);
    }
    if (at_->size() < agents) {
      at_->resize(agents, 0);
    }
    return *at_;
  }

  std::shared_ptr<std::vector<uint32_t>> at_;
  std::shared_ptr<std::vector<uint32_t>> joined_;  // the last; held, so that it cannot change
};

}  // namespace emu

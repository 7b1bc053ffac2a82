// SPDX-License-Identifier: Apache-2.0
//
// Blocks of huge pages for large results. Freed blocks are kept, up to a limit, because a page's
// first write costs more than the kernel's: the system must find the page and fill it with zeros.
// A kept block is marked MADV_FREE: it stays mapped, and whoever runs short of memory takes it.
#include "dilseg/cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dilseg::cpu {

#ifdef __linux__
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

PageBlock map_block(size_t bytes) {
  // One huge page more than needed, and what lies outside of the boundaries goes back.
  const size_t mapped = bytes + kHugePage;
  void* const map =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) {
    return {};
  }
  char* const begin = static_cast<char*>(map);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(map) % kHugePage) % kHugePage;
  char* const data = begin + before;
  if (before > 0) {
    munmap(begin, before);
  }
  munmap(data + bytes, mapped - before - bytes);
  // A refusal costs speed only.
  (void)madvise(data, bytes, MADV_HUGEPAGE);
  return {data, bytes};
}

size_t cache_limit() {
  const char* mib = std::getenv("DILSEG_CPU_RESULT_CACHE");
  constexpr size_t kDefault = 256;
  return (mib == nullptr ? kDefault : std::strtoull(mib, nullptr, 10)) << 20;
}

// Its lock is only tried: a process that was forked while another thread held it must not wait.
class Cache {
 public:
  // A kept block of the size or little more.
  PageBlock take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return {};
    }
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 8 &&
          (best == blocks_.end() || block->bytes <= best->bytes)) {
        best = block;
      }
    }
    if (best == blocks_.end()) {
      return {};
    }
    const PageBlock taken = *best;
    blocks_.erase(best);
    bytes_ -= taken.bytes;
    return taken;
  }

  void give(PageBlock block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > limit_) {
      munmap(block.data, block.bytes);
      return;
    }
    while (bytes_ + block.bytes > limit_) {
      munmap(blocks_.front().data, blocks_.front().bytes);
      bytes_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
    (void)madvise(block.data, block.bytes, MADV_FREE);
    blocks_.push_back(block);
    bytes_ += block.bytes;
  }

 private:
  const size_t limit_ = cache_limit();
  std::mutex mutex_;
  std::vector<PageBlock> blocks_;  // the one kept longest first
  size_t bytes_ = 0;
};

// Never destroyed: results may outlive the end of main.
Cache& cache() {
  static auto* const instance = new Cache;
  return *instance;
}

}  // namespace

PageBlock take_pages(size_t bytes) {
  const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const PageBlock kept = cache().take(whole);
  return kept.data == nullptr ? map_block(whole) : kept;
}

void give_pages(PageBlock block) { cache().give(block); }

#else

PageBlock take_pages(size_t /*bytes*/) { return {}; }
void give_pages(PageBlock /*block*/) {}

#endif

}  // namespace dilseg::cpu

// Runs a launch: blocks one after another, the threads of a block as fibers that run until they wait (at a barrier or
// in a warp collective) or return, in an order that the test picks.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "guarded_memory.h"
#include "thread.h"

namespace cuda_on_cpu {

class Engine {
 public:
  void run(const LaunchShape& shape, void (*call)(void*), void* kernel) {
    note::release(&launch_sync_);
    note::ShimCode shim;
    require_valid(shape);
    if (running_) throw KernelError("one launch at a time");
    running_ = true;
    shape_ = shape, call_ = call, kernel_ = kernel, error_.clear(), random_.seed(options.seed);
    gridDim = shape.grid, blockDim = shape.block;
    main_.become_current_thread();
    make_threads();
    arrange(block_order_, size_t{shape.grid.x} * shape.grid.y * shape.grid.z);
    arrange(warp_order_, threads_.size() / warpSize);
    arrange(lane_order_, warpSize);
    before_wait_ = shape.early;
    if (before_wait_) GuardedMemory::hide_all(guarded_shared_ ? &*guarded_shared_ : nullptr);
    try {
      for (unsigned b : next(block_order_)) run_block(b);
    } catch (...) {
      running_ = false;
      if (std::exchange(before_wait_, false)) GuardedMemory::show_all();
      note::acquire(&grid_sync_);
      throw;
    }
    running_ = false;
    note::acquire(&grid_sync_);
  }

  bool running() const { return running_; }
  const LaunchShape& shape() const { return shape_; }  // of the last launch
  Thread& self() { return threads_[current_]; }
  unsigned lane() const { return current_ % warpSize; }

  void* shared_bytes(size_t bytes) {
    if (bytes > shape_.shared_bytes)
      fail("the kernel uses " + std::to_string(bytes) + " bytes of shared memory, its launch asked for " +
           std::to_string(shape_.shared_bytes));
    return shared_;
  }

  unsigned shared_address(const void* p) const {
    return static_cast<unsigned>(static_cast<const char*>(p) - static_cast<const char*>(shared_));
  }
  char* at_shared_address(unsigned address) const { return static_cast<char*>(shared_) + address; }

  std::string where() const {
    return block() + " thread " + to_string(threads_[current_].index);
  }

  // Ends the launch from inside a kernel thread: run() throws on the caller's stack.
  [[noreturn]] void fail(const std::string& message) {
    note::ShimCode shim;
    error_ = where() + ": " + message;
    Fiber::switch_to(*self().fiber, main_);
    std::abort();
  }

  void barrier(Site site) {
    meet_others();
    void* sync = turn(barrier_sync_, &Thread::barriers);
    note::release(sync);
    {
      note::ShimCode shim;
      Thread& me = self();
      wait(me, Thread::State::at_barrier, "__syncthreads", site);
      if (++at_barrier_ == threads_.size()) {
        for (Thread& t : threads_)
          if (!(t.site == site)) fail("barriers differ:" + waiting());
        for (Thread& t : threads_) t.state = Thread::State::ready;
        at_barrier_ = 0;
      }
      Fiber::switch_to(*me.fiber, main_);
    }
    note::acquire(sync);
  }

  // Every lane in mask brings `in`; the last to arrive runs exchange(in[32], out[32]) for all of them.
  template <class Out, class In, class Exchange>
  Out warp_call(const char* call, unsigned mask, const In& in, Exchange exchange, Site site) {
    note::ShimCode shim;
    Out out{};
    Thread& me = self();
    unsigned lane = this->lane(), first = current_ - lane;
    if (!(mask >> lane & 1)) fail(std::string(call) + ": the calling lane is not in its mask");
    wait(me, Thread::State::in_warp_call, call, site);
    me.mask = mask, me.in = &in, me.out = &out;
    unsigned& arrived = in_warp_call_[first / warpSize];
    arrived |= 1u << lane;
    if ((arrived & mask) == mask) {
      const In* ins[warpSize] = {};
      Out* outs[warpSize] = {};
      for (unsigned l = 0; l < warpSize; ++l) {
        if (!(mask >> l & 1)) continue;
        Thread& t = threads_[first + l];
        if (t.mask != mask || std::strcmp(t.call, me.call) || !(t.site == site)) fail("warp calls differ:" + waiting());
        ins[l] = static_cast<const In*>(t.in), outs[l] = static_cast<Out*>(t.out);
        t.state = Thread::State::ready;
      }
      exchange(ins, outs);
      arrived &= ~mask;
    }
    Fiber::switch_to(*me.fiber, main_);
    return out;
  }

  void warp_barrier(unsigned mask, Site site) {
    meet_others();
    void* sync = turn(warp_sync_[current_ / warpSize], &Thread::warp_barriers);
    note::release(sync);
    warp_call<int>("__syncwarp", mask, 0, [](auto&, auto&) {}, site);
    note::acquire(sync);
  }

  // --- cp.async ---

  void begin_copy(const AsyncCopy& copy) {
    note::ShimCode shim;
    self().copies.push_back(copy);
    self().copies.back().group = self().copy_groups;
  }

  void commit_copies() {
    note::ShimCode shim;
    ++self().copy_groups;
  }

  // Takes out the oldest copy if all but `pending` committed groups hold it; false where there is none.
  bool finish_copy(int pending, AsyncCopy& copy) {
    note::ShimCode shim;
    Thread& me = self();
    if (me.copies.empty() || me.copies.front().group >= me.copy_groups - pending) return false;
    copy = me.copies.front();
    me.copies.pop_front();
    return true;
  }

  bool before_wait() const { return before_wait_; }

  // From now on the launch may touch what kernels before it wrote; until its first thread is here, it is out of reach.
  void await_kernels_before() {
    note::ShimCode shim;
    self().waited = true;
    if (std::exchange(before_wait_, false)) GuardedMemory::show_all();
  }

  // --- what barriers of other kinds are made of ---

  Asynchronous asynchronous;

  // The running thread's own access to memory, which may be shared memory.
  void access(const void* p, size_t bytes, bool written) {
    note::ShimCode shim;
    const char *at = static_cast<const char*>(p), *begin = static_cast<const char*>(shared_);
    if (asynchronous.mbarriers.empty() || at < begin || at >= begin + shape_.shared_bytes) return;
    const unsigned first = shared_address(at) / Unfenced::kBytes;
    const unsigned last = (shared_address(at) + static_cast<unsigned>(bytes) - 1) / Unfenced::kBytes;
    if (asynchronous.unfenced.empty()) asynchronous.unfenced.resize(shape_.shared_bytes / Unfenced::kBytes + 1);
    for (unsigned chunk = first; chunk <= last; ++chunk) {
      Unfenced& all = asynchronous.unfenced[chunk];
      ++(written ? all.writes : all.reads);
      self().unfenced.push_back({chunk, written});
    }
  }
  void fence_async() {
    note::ShimCode shim;
    for (const auto& [chunk, written] : self().unfenced) {
      Unfenced& all = asynchronous.unfenced[chunk];
      --(written ? all.writes : all.reads);
    }
    self().unfenced.clear();
  }
  // What the thread has not fenced by now stays so.
  void meet_others() {
    note::ShimCode shim;
    self().unfenced.clear();
  }
  // Accesses to the 16 bytes at that place that the async proxy need not see yet.
  Unfenced unfenced_at(unsigned address) const {
    note::ShimCode shim;
    const size_t chunk = address / Unfenced::kBytes;
    return chunk < asynchronous.unfenced.size() ? asynchronous.unfenced[chunk] : Unfenced{};
  }

  // Until wake(on).
  void sleep(const void* on, const char* call, Site site) {
    note::ShimCode shim;
    Thread& me = self();
    wait(me, Thread::State::asleep, call, site);
    me.in = on;
    Fiber::switch_to(*me.fiber, main_);
  }

  void wake(const void* on) {
    for (Thread& t : threads_)
      if (t.state == Thread::State::asleep && t.in == on) t.state = Thread::State::ready;
  }

 private:
  static constexpr size_t kStack = 256 << 10, kGuard = 4096, kStride = kStack + kGuard;
#ifdef __SANITIZE_THREAD__
  static constexpr unsigned kSets = 2;  // neighbouring blocks on different fibers, or they would seem to be ordered
#else
  static constexpr unsigned kSets = 1;
#endif
  static constexpr unsigned kMostThreads = 1024, kFibers = kSets * kMostThreads;

  // Two addresses by turns: a thread already at the next barrier must not seem ordered before one still in this.
  void* turn(char (&sync)[2], unsigned Thread::*passed) {
    note::ShimCode shim;
    return &sync[(self().*passed)++ % 2];
  }

  static void require_valid(const LaunchShape& s) {
    const auto refuse = [&](const std::string& why) { throw KernelError(std::string(s.name) + ": " + why); };
    const size_t threads = size_t{s.block.x} * s.block.y * s.block.z;
    if (threads == 0 || threads > kMostThreads || threads % warpSize)
      refuse("a block has " + std::to_string(threads) + " threads: not whole warps up to 1024");
    if (!s.grid.x || !s.grid.y || !s.grid.z || s.grid.x > 0x7FFFFFFF || s.grid.y > 65535 || s.grid.z > 65535)
      refuse("the grid is empty or too large");
    if (s.shared_bytes > options.shared_bytes) refuse("too much shared memory");
  }

  void make_threads() {
    const dim3 block = shape_.block;
    threads_.clear();
    threads_.resize(block.x * block.y * block.z);
    for (unsigned i = 0; i < threads_.size(); ++i)
      threads_[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }

  Fiber& fiber(unsigned set, unsigned i) {
    if (!stacks_) {
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* stacks = mmap(nullptr, kFibers * kStride, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (stacks == MAP_FAILED) throw std::bad_alloc();
      stacks_ = static_cast<char*>(stacks);
      for (unsigned f = 0; f < kFibers; ++f) mprotect(stacks_ + f * kStride, kGuard, PROT_NONE);
      fibers_.resize(kFibers);
    }
    unsigned f = set * kMostThreads + i;  // stacks are staggered, or all their tops would share one cache set
    if (!fibers_[f].started()) fibers_[f].start(stacks_ + f * kStride + kGuard, kStack - f % 32 * 128, fiber_main);
    return fibers_[f];
  }

  static void fiber_main();

  void run_block(unsigned b) {
    const dim3 grid = shape_.grid;
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    allocate_shared();
    at_barrier_ = returned_ = 0;
    std::fill(std::begin(in_warp_call_), std::end(in_warp_call_), 0u);
    const unsigned set = blocks_run_++ % kSets;
    for (unsigned i = 0; i < threads_.size(); ++i) threads_[i].restart(fiber(set, i));
    asynchronous = {};
    while (error_.empty() && returned_ < threads_.size()) {
      bool progress = false;
      for (unsigned warp : next(warp_order_)) progress |= run_warp(warp);
      if (!progress || (options.order == Order::random && random_() % 4 == 0)) progress |= let_a_copy_be_done();
      if (!progress && error_.empty())
        error_ = block() + ": deadlock:" + waiting();
    }
    if (error_.empty()) error_ = left_over();
    if (error_.empty()) return;
    for (Thread& t : threads_) t.fiber->abandon(&grid_sync_);
    throw KernelError(error_);
  }

  // By one of the threads that wait for it.
  bool let_a_copy_be_done() {
    for (unsigned i = 0, first = random_(); i < threads_.size(); ++i) {
      Thread& t = threads_[(first + i) % threads_.size()];
      if (t.state != Thread::State::asleep) continue;
      const auto found = asynchronous.mbarriers.find(t.in);
      if (found == asynchronous.mbarriers.end() || found->second.copies.empty()) continue;
      t.does_a_copy = true, t.state = Thread::State::ready;
      return true;
    }
    return false;
  }

  // What a block that returns has not waited for.
  std::string left_over() const {
    for (const auto& barrier : asynchronous.mbarriers)
      if (!barrier.second.copies.empty()) return block() + ": a bulk copy nobody waited for";
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (!threads_[i].products.under_way.empty()) return block() + ": a wgmma nobody waited for";
      const size_t first = i / (4 * warpSize) * (4 * warpSize);
      if (threads_[i].products.begun != threads_[first].products.begun)
        return block() + ": a wgmma that a part of a warpgroup began";
    }
    return {};
  }

  // What nobody wrote reads as 0xFF bytes: NaN in every float format, -1 as an integer.
  void allocate_shared() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    std::free(shared_);  // the sanitizer watches its ends; a new one for each block, or blocks would seem to race
    if (posix_memalign(&shared_, 128, std::max<size_t>(shape_.shared_bytes, 1))) throw std::bad_alloc();
#else
    if (!guarded_shared_ || guarded_shared_->bytes() != shape_.shared_bytes)
      guarded_shared_.emplace("shared memory", shape_.shared_bytes, Flush::end, 128);
    shared_ = guarded_shared_->data();
#endif
    std::memset(shared_, 0xFF, shape_.shared_bytes);
  }

  // Runs a warp until all its lanes wait for other warps (in random order: or until chance says another's turn).
  // Warps so drift as far apart as barriers let them, which is what shows a missing barrier.
  bool run_warp(unsigned warp) {
    for (bool any = false;; any = true) {
      bool progress = false;
      for (unsigned lane : next(lane_order_)) {
        current_ = warp * warpSize + lane;
        Thread& t = threads_[current_];
        if (t.state != Thread::State::ready) continue;
        progress = true, threadIdx = t.index;
        Fiber::switch_to(main_, *t.fiber);
        if (!error_.empty()) return true;
      }
      if (!progress) return any;
      if (options.order == Order::random && random_() % 8 == 0) return true;
    }
  }

  std::string block() const { return std::string(shape_.name) + " block " + to_string(blockIdx); }

  static void wait(Thread& t, Thread::State state, const char* call, Site site) {
    t.state = state, t.call = call, t.site = site;
  }

  static void arrange(std::vector<unsigned>& order, size_t n) {
    order.resize(n);
    std::iota(order.begin(), order.end(), 0u);
    if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
  }

  const std::vector<unsigned>& next(std::vector<unsigned>& order) {
    if (options.order == Order::random) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  static std::string place(const Thread& t) {
    if (t.state == Thread::State::returned) return "returned";
    if (t.state == Thread::State::ready) return "not there yet";
    return "in " + std::string(t.call) + " at " + t.site.file + ":" + std::to_string(t.site.line);
  }

  // Who waits where: one line per place.
  std::string waiting() const {
    struct Place {
      std::string name;
      unsigned count;
      uint3 first;
    };
    std::vector<Place> places;
    for (const Thread& t : threads_) {
      const std::string name = place(t);
      auto same = std::find_if(places.begin(), places.end(), [&](const Place& p) { return p.name == name; });
      if (same == places.end())
        places.push_back({name, 1, t.index});
      else
        ++same->count;
    }
    std::string text;
    for (const Place& p : places)
      text += "\n  " + std::to_string(p.count) + " threads, the first " + to_string(p.first) + ", " + p.name;
    return text;
  }

  LaunchShape shape_{};
  void (*call_)(void*) = nullptr;
  void* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> block_order_, warp_order_, lane_order_;
  std::mt19937 random_;
  Fiber main_;
  std::vector<Fiber> fibers_;
  char* stacks_ = nullptr;
  void* shared_ = nullptr;
  std::optional<GuardedMemory> guarded_shared_;
  std::string error_;
  size_t at_barrier_ = 0, returned_ = 0, blocks_run_ = 0;
  unsigned current_ = 0;
  unsigned in_warp_call_[kMostThreads / warpSize] = {};
  // Addresses for the thread sanitizer: what comes before and after what.
  char barrier_sync_[2] = {}, warp_sync_[kMostThreads / warpSize][2] = {}, launch_sync_ = 0, grid_sync_ = 0;
  bool running_ = false, before_wait_ = false;
};
inline Engine engine;

inline void Engine::fiber_main() {
  Fiber::entered(engine.main_);
  for (;;) {
    note::acquire(&engine.launch_sync_);
    engine.call_(engine.kernel_);
    note::release(&engine.grid_sync_);
    Fiber* me;
    {
      note::ShimCode shim;
      me = engine.self().fiber;
      if (engine.shape_.early && !engine.self().waited) engine.fail("returns without waiting for the kernels before");
      engine.self().state = Thread::State::returned;
      ++engine.returned_;
    }
    Fiber::switch_to(*me, engine.main_);
  }
}

inline void GuardedMemory::on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<char*>(info->si_addr);
  if (engine.running())
    for (const GuardedMemory* b : all())
      if (at >= b->base_ && at < b->base_ + b->inner_ + 2 * kFence) engine.fail(
            b->describe(at) + (engine.before_wait() ? ", before the launch has waited for the kernels before it" : ""));
  sigaction(SIGSEGV, &previous_action(), nullptr);  // not ours: the access faults again, for whoever watched before
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  struct Bound {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } bound{kernel, {std::forward<Args>(args)...}};
  const auto call = [](void* b) { std::apply(static_cast<Bound*>(b)->kernel, static_cast<Bound*>(b)->params); };
  engine.run(shape, call, &bound);
}

}  // namespace cuda_on_cpu

#ifdef __SANITIZE_ADDRESS__
extern "C" inline __attribute__((used)) void __asan_on_error() {
  if (cuda_on_cpu::engine.running()) std::fprintf(stderr, "in %s\n", cuda_on_cpu::engine.where().c_str());
}
#endif
#ifdef __SANITIZE_THREAD__
extern "C" inline __attribute__((used)) void __tsan_on_report(void*) {
  if (cuda_on_cpu::engine.running()) std::fprintf(stderr, "in %s\n", cuda_on_cpu::engine.where().c_str());
}
#endif

// Memory between pages that may not be touched: an access past either end, however far, ends the launch with the
// kernel, block, thread and distance. It needs no sanitizer and costs nothing.
#pragma once

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace cuda_on_cpu {

// The data lie flush against one end, so the other fence is up to a page away.
enum class Flush { end, begin };

class GuardedMemory {
 public:
  GuardedMemory(const char* name, size_t bytes, Flush flush = Flush::end, size_t align = 1)
      : name_(name), bytes_(bytes), inner_((bytes + kPage - 1) / kPage * kPage) {
    catch_faults();
    void* all = mmap(nullptr, inner_ + 2 * kFence, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(all);
    mprotect(base_ + kFence, inner_, PROT_READ | PROT_WRITE);
    std::memset(base_ + kFence, 0xFF, inner_);
    data_ = base_ + kFence + (flush == Flush::end ? (inner_ - bytes) / align * align : 0);
    GuardedMemory::all().push_back(this);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() {
    all().erase(std::find(all().begin(), all().end(), this));
    munmap(base_, inner_ + 2 * kFence);
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Makes writes errors as well.
  void read_only() { protect(access_ = PROT_READ); }

  // All of it, but for `visible`: any access ends the launch until show_all().
  static void hide_all(const GuardedMemory* visible) {
    for (const GuardedMemory* b : all())
      if (b != visible) b->protect(PROT_NONE);
  }
  static void show_all() {
    for (const GuardedMemory* b : all()) b->protect(b->access_);
  }

 private:
  static constexpr size_t kPage = 4096, kFence = size_t{1} << 30;

  static std::vector<GuardedMemory*>& all() {
    static auto& buffers = *new std::vector<GuardedMemory*>;  // outlives every buffer
    return buffers;
  }

  static struct sigaction& previous_action() {
    static struct sigaction action {};
    return action;
  }

  static void catch_faults() {
    static bool done = false;
    if (std::exchange(done, true)) return;
    static char stack[64 << 10];  // a fiber's own may be what overflowed
    stack_t alternate{};
    alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action());
  }

  static void on_fault(int, siginfo_t* info, void*);  // engine.h: it ends the launch

  std::string describe(const char* at) const {
    std::string text = "access to " + std::string(name_) + " (" + std::to_string(bytes_) + " bytes) ";
    if (at < data_) return text + std::to_string(data_ - at) + " bytes before its begin";
    if (at >= data_ + bytes_) return text + std::to_string(at - data_ - bytes_) + " bytes past its end";
    return text + "at byte " + std::to_string(at - data_) + ": a write, and it is read-only";
  }

  void protect(int access) const { mprotect(base_ + kFence, inner_, access); }

  const char* name_;
  size_t bytes_, inner_;
  int access_ = PROT_READ | PROT_WRITE;
  char *base_, *data_;
};

}  // namespace cuda_on_cpu

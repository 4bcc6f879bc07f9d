// The default executor: a fixed set of threads that take the indices of one loop at a time.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/message.h"
#include "sla2/executor.h"

namespace sla2 {
namespace {

using Task = std::function<void(std::int64_t, std::int64_t)>;

class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(std::int64_t num_threads) : num_threads_(num_threads) {
    threads_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (std::int64_t worker = 1; worker < num_threads; ++worker) {
        threads_.emplace_back([this, worker] { serve(worker); });
      }
    } catch (const std::system_error& error) {
      stop();
      throw Error(ErrorKind::kRuntime, message("cannot start thread ", threads_.size() + 2, " of ",
                                               num_threads, ": ", error.what()));
    }
  }

  ~ThreadPool() override { stop(); }

  [[nodiscard]] std::int64_t num_threads() const override { return num_threads_; }

  void parallel_for(std::int64_t n, const Task& task) override {
    // The loop that the task belongs to holds the pool: waiting for it would never end.
    require(running_in_ != this, "parallel_for must not be called from a task of the same pool");
    if (n <= 0) return;
    const std::lock_guard one_loop_at_a_time(loop_mutex_);
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      end_ = n;
      next_.store(0, std::memory_order_relaxed);
      error_ = nullptr;
      // A single task needs nobody else.
      busy_ = n > 1 ? static_cast<std::int64_t>(threads_.size()) : 0;
      if (busy_ > 0) ++generation_;
    }
    if (n > 1) start_.notify_all();
    work(0);
    spin_until([this] { return busy_.load(std::memory_order_acquire) == 0; });
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    task_ = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  /// A short wait by looking: to sleep and be woken takes longer than most gaps between two loops.
  template <typename Condition>
  static void spin_until(const Condition& holds) {
    constexpr auto kLongest = std::chrono::microseconds(50);
    const auto end = std::chrono::steady_clock::now() + kLongest;
    while (!holds() && std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 16 && !holds(); ++i) pause();
    }
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void serve(std::int64_t worker) {
    std::uint64_t seen = 0;
    while (true) {
      spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; });
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return stopping_ || generation_ != seen; });
        if (stopping_) return;
        seen = generation_;
      }
      work(worker);
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work(std::int64_t worker) {
    const Executor* outer = running_in_;
    running_in_ = this;
    try {
      for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < end_;) {
        (*task_)(i, worker);
      }
    } catch (...) {
      next_.store(end_, std::memory_order_relaxed);  // nobody starts another index
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    running_in_ = outer;
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  static thread_local const Executor* running_in_;  // whose task this thread runs, if any

  const std::int64_t num_threads_;
  std::mutex loop_mutex_;  // held by the caller whose loop runs

  std::mutex mutex_;  // guards what follows, except next_
  std::condition_variable start_;
  std::condition_variable done_;
  const Task* task_ = nullptr;
  std::int64_t end_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> busy_{0};  // threads that have not finished the loop
  std::atomic<std::uint64_t> generation_{0};
  std::exception_ptr error_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

thread_local const Executor* ThreadPool::running_in_ = nullptr;

}  // namespace

std::unique_ptr<Executor> make_thread_pool(std::int64_t num_threads) {
  require(num_threads >= 1 && num_threads <= 1024, "num_threads must be in [1, 1024], got ",
          num_threads);
  return std::make_unique<ThreadPool>(num_threads);
}

}  // namespace sla2

// Two threads answer a lookup of 16,384 ids in 0.28 ms, one in 0.45 (the README's run of 2026-11-30).
//
// The threads are made when they are first asked for, in the process that asks: a fork copies none of them, so that the
// child makes its own. They are shared by all who ask; who finds them busy does the work himself.

#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace dpq {
namespace {

constexpr int64_t kMostHelpers = 255;

struct Job {
  const std::function<void(int64_t)>& work;
  const int64_t num_parts;
  std::atomic<int64_t> next{0};
  int64_t num_helpers = 0;  // at work on it; held by the pool's mutex
  std::condition_variable left;

  void help() {
    for (int64_t part = next++; part < num_parts; part = next++) work(part);
  }
};

class Pool {
 public:
  void run(Job& job, int64_t num_helpers) {
    invite(job, num_helpers);
    job.help();
    std::unique_lock<std::mutex> lock(mutex_);
    invitations_.erase(std::remove(invitations_.begin(), invitations_.end(), &job), invitations_.end());
    job.left.wait(lock, [&] { return job.num_helpers == 0; });
  }

 private:
  void invite(Job& job, int64_t num_helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_threads_ < num_helpers && start_thread()) ++num_threads_;
      invitations_.insert(invitations_.end(), static_cast<size_t>(num_helpers), &job);
    }
    num_helpers == 1 ? invited_.notify_one() : invited_.notify_all();
  }

  // False where the system gives no more: then there is less help.
  bool start_thread() {
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      invited_.wait(lock, [&] { return !invitations_.empty(); });
      Job& job = *invitations_.front();
      invitations_.pop_front();
      ++job.num_helpers;
      lock.unlock();
      job.help();
      lock.lock();
      if (--job.num_helpers == 0) job.left.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable invited_;
  std::deque<Job*> invitations_;  // a job stands here as often as it may have helpers
  int64_t num_threads_ = 0;
};

std::mutex making;  // held over a fork, so that no child finds it locked
Pool* pool = nullptr;

// Never deleted: its threads wait on it until the process ends.
Pool& pool_of_this_process() {
  static const int registered = pthread_atfork([] { making.lock(); }, [] { making.unlock(); },
                                               [] {
                                                 pool = nullptr;
                                                 making.unlock();
                                               });
  static_cast<void>(registered);
  std::lock_guard<std::mutex> lock(making);
  if (pool == nullptr) pool = new Pool;
  return *pool;
}

}  // namespace

void run_parts(int64_t num_parts, int64_t num_threads, const std::function<void(int64_t)>& work) {
  Job job{work, num_parts};
  const int64_t num_helpers = std::min({num_threads, num_parts, kMostHelpers + 1}) - 1;
  num_helpers > 0 ? pool_of_this_process().run(job, num_helpers) : job.help();
}

}  // namespace dpq

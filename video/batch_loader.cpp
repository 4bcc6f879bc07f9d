#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "video/data.h"

namespace sla2::video {

struct BatchLoader::State {
  State(const Dataset& data, const Options& how) : dataset(data), options(how) {}

  const Dataset& dataset;
  Options options;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::int64_t, Batch> ready;  // by ticket: step * micro_batches + micro
  std::int64_t next_ticket = 0;         // to be made
  std::int64_t next_wanted = 0;         // to be handed out
  std::exception_ptr failure;
  bool stopping = false;
  std::vector<std::thread> threads;

  void work();
  Batch make(std::int64_t ticket) const;
};

Batch BatchLoader::State::make(std::int64_t ticket) const {
  const std::int64_t step = ticket / options.micro_batches;
  const std::int64_t micro = ticket % options.micro_batches;
  Batch batch = dataset.batch(options.seed, step, options.batch, micro * options.batch);
  if (options.pinned) {
    if (batch.pixels.defined()) batch.pixels = batch.pixels.pin_memory();
    if (batch.latents.defined()) batch.latents = batch.latents.pin_memory();
    if (batch.text.defined()) batch.text = batch.text.pin_memory();
  }
  return batch;
}

void BatchLoader::State::work() {
  std::unique_lock lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return stopping || next_ticket < next_wanted + options.ahead; });
    if (stopping) return;
    const std::int64_t ticket = next_ticket++;
    lock.unlock();
    try {
      Batch batch = make(ticket);
      lock.lock();
      ready.emplace(ticket, std::move(batch));
    } catch (...) {
      lock.lock();
      if (!failure) failure = std::current_exception();
      stopping = true;
    }
    changed.notify_all();
  }
}

BatchLoader::BatchLoader(const Dataset& dataset, const Options& options)
    : state_(new State(dataset, options)) {
  state_->next_ticket = state_->next_wanted = options.first_step * options.micro_batches;
  for (std::int64_t i = 0; i < options.threads; ++i) {
    state_->threads.emplace_back([state = state_.get()] { state->work(); });
  }
}

BatchLoader::~BatchLoader() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

Batch BatchLoader::at(std::int64_t step, std::int64_t micro) {
  const std::int64_t ticket = step * state_->options.micro_batches + micro;
  // Only the caller's own thread moves next_wanted.
  return ticket == state_->next_wanted ? next() : state_->make(ticket);
}

Batch BatchLoader::next() {
  std::unique_lock lock(state_->mutex);
  State& state = *state_;
  state.changed.wait(lock,
                     [&] { return state.failure || state.ready.contains(state.next_wanted); });
  const auto found = state.ready.find(state.next_wanted);
  if (found == state.ready.end()) std::rethrow_exception(state.failure);
  Batch batch = std::move(found->second);
  state.ready.erase(found);
  ++state.next_wanted;
  state.changed.notify_all();
  return batch;
}

}  // namespace sla2::video

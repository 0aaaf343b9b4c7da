#include "scheduler/control_session.h"

#include <utility>

namespace switchyard {

std::shared_ptr<ControlSession> ControlSession::Accept(grpc::CallbackServerContext* context,
                                                       Handler handler) {
  // The constructor is private, so make_shared cannot reach it.
  std::shared_ptr<ControlSession> session(new ControlSession(context, std::move(handler)));
  MutexLock lock(session->mu_);
  session->self_ = session;
  return session;
}

ControlSession* ControlSession::Refuse(grpc::CallbackServerContext* context,
                                       const grpc::Status& status) {
  const std::shared_ptr<ControlSession> session = Accept(context, {});
  session->Close(status, /*abandon=*/false);
  return session.get();
}

ControlSession::ControlSession(grpc::CallbackServerContext* context, Handler handler)
    : context_(context), handler_(std::move(handler)), peer_(context->peer()) {}

void ControlSession::Next() {
  {
    MutexLock lock(mu_);
    if (!finished_) {
      StartRead(&incoming_);
      return;
    }
  }
  handler_.on_end(shared_from_this());  // no read will say so
}

void ControlSession::Send(v1::SchedulerMessage message) {
  bool abandon = false;
  {
    MutexLock lock(mu_);
    if (closing_) return;
    queue_.push_back(std::move(message));
    if (queue_.size() == 1) StartWrite(&queue_.front());
    abandon = queue_.size() > kMaxQueued;
  }
  if (abandon) {
    Close(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the worker does not read"),
          /*abandon=*/true);
  }
}

void ControlSession::Close(const grpc::Status& status, bool abandon) {
  MutexLock lock(mu_);
  if (!closing_) {
    closing_ = true;
    status_ = status;
  }
  if (abandon) {
    if (queue_.size() > 1) queue_.erase(queue_.begin() + 1, queue_.end());
    context_->TryCancel();
  }
  FinishIfIdle();
}

void ControlSession::FinishIfIdle() {
  if (!closing_ || finished_ || !queue_.empty()) return;
  finished_ = true;
  Finish(status_);
}

void ControlSession::OnReadDone(bool ok) {
  const std::shared_ptr<ControlSession> self = shared_from_this();
  {
    MutexLock lock(mu_);
    if (closing_) ok = false;  // what a refused or fenced worker still says counts for nothing
  }
  if (ok) {
    handler_.on_message(self, std::move(incoming_));
    return;
  }
  if (handler_.on_end != nullptr) handler_.on_end(self);
  Close(grpc::Status::OK, /*abandon=*/false);
}

void ControlSession::OnWriteDone(bool ok) {
  MutexLock lock(mu_);
  queue_.pop_front();
  if (!ok) {
    closing_ = true;
    queue_.clear();
  }
  if (!queue_.empty()) {
    StartWrite(&queue_.front());
  } else {
    FinishIfIdle();
  }
}

void ControlSession::OnCancel() {
  Close(grpc::Status(grpc::StatusCode::CANCELLED, "cancelled"), /*abandon=*/false);
}

void ControlSession::OnDone() {
  std::shared_ptr<ControlSession> self;
  MutexLock lock(mu_);
  self = std::move(self_);
}

}  // namespace switchyard

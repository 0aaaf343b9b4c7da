// The two ways in which a Generation answers over HTTP: one JSON body, or a stream of events.
// Consumers, owned by their Generation; called on the task pool.
#pragma once

#include <memory>

#include "server/generation.h"
#include "server/http_server.h"
#include "server/openai_format.h"

namespace switchyard {

// `headers` (x-request-id and the like) go into the answer.
std::unique_ptr<GenerationConsumer> NewWholeAnswer(AnswerIdentity identity, size_t num_choices,
                                                   HttpHeaders headers,
                                                   std::shared_ptr<HttpExchange> exchange);
std::unique_ptr<GenerationConsumer> NewStreamedAnswer(AnswerIdentity identity, bool usage_asked,
                                                      HttpHeaders headers,
                                                      std::shared_ptr<HttpExchange> exchange);

// The response for an error before any byte was sent.
HttpResponse ErrorResponse(const absl::Status& status, HttpHeaders headers);

}  // namespace switchyard

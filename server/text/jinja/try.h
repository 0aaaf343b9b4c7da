// SY_TRY(declaration, expression): unwraps an absl::StatusOr or returns its error.
// SY_OK(expression): the same for an absl::Status. Without them an evaluator of a hundred fallible
// calls cannot be read.
//
// Owner: server/text/jinja, included by its .cc files only. Must never be used where a lock has to
// be released by hand.
#pragma once

#include <utility>

#define SY_TRY_NAME2(line) sy_try_##line
#define SY_TRY_NAME(line) SY_TRY_NAME2(line)
#define SY_TRY(declaration, ...)                                          \
  auto SY_TRY_NAME(__LINE__) = (__VA_ARGS__);                             \
  if (!SY_TRY_NAME(__LINE__).ok()) return SY_TRY_NAME(__LINE__).status(); \
  declaration = *std::move(SY_TRY_NAME(__LINE__))

#define SY_OK(...)                                                                 \
  do {                                                                             \
    if (absl::Status sy_status = (__VA_ARGS__); !sy_status.ok()) return sy_status; \
  } while (0)

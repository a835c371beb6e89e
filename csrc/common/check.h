// Errors that a user may see: exceptions with text, turned into Python's by pybind11.
#pragma once

#include <stdexcept>
#include <string>

// Throws std::invalid_argument (ValueError) unless `condition` holds.
#define RLHF_CHECK(condition, message)                      \
  do {                                                      \
    if (!(condition)) throw std::invalid_argument(message); \
  } while (0)

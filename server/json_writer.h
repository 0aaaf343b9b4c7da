// JsonWriter: appends JSON to a string, in the order in which it is called. A value: owned and used
// by one thread. It checks nothing: the caller opens and closes in order, gives a key before each
// member of an object, and passes valid UTF-8. Numbers that JSON cannot hold (infinities, NaN)
// become -9999.0, as the OpenAI API does for logprobs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace switchyard {

// Appends `text` in quotes, escaped.
void AppendJsonString(std::string_view text, std::string& out);

class JsonWriter {
 public:
  JsonWriter& BeginObject() { return Open('{'); }
  JsonWriter& EndObject() { return Close('}'); }
  JsonWriter& BeginArray() { return Open('['); }
  JsonWriter& EndArray() { return Close(']'); }
  JsonWriter& Key(std::string_view key);
  JsonWriter& String(std::string_view value);
  JsonWriter& Int(int64_t value);
  JsonWriter& Float(float value);
  JsonWriter& Double(double value);
  JsonWriter& Bool(bool value);
  JsonWriter& Null();

  // Members, for short.
  JsonWriter& Member(std::string_view key, std::string_view value) {
    return Key(key).String(value);
  }
  JsonWriter& Member(std::string_view key, int64_t value) { return Key(key).Int(value); }

  const std::string& str() const { return out_; }
  std::string Take() { return std::move(out_); }

 private:
  JsonWriter& Open(char c);
  JsonWriter& Close(char c);
  void Separate();

  std::string out_;
  bool need_comma_ = false;
};

}  // namespace switchyard

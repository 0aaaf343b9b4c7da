#include "scheduler/cluster_credentials.h"

#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace switchyard {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return std::string(std::istreambuf_iterator<char>(file), {});
}

bool IsLoopback(const std::string& host) {
  if (host == "localhost" || host == "::1" || host == "[::1]") return true;
  return absl::StartsWith(host, "127.") &&
         host.find_first_not_of("0123456789.") == std::string::npos;
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const ClusterCredentials& options) {
  const int files =
      !options.certificate.empty() + !options.private_key.empty() + !options.ca.empty();
  if (files == 0) {
    if (options.token.empty() && !IsLoopback(options.host)) {
      return absl::InvalidArgumentError(
          absl::StrCat("anybody who reaches ", options.host,
                       " could be a worker: set --cluster-token, --cluster-token-file or the "
                       "--cluster-cert, --cluster-key and --cluster-ca of mutual TLS"));
    }
    return grpc::InsecureServerCredentials();
  }
  if (files != 3) {
    return absl::InvalidArgumentError(
        "mutual TLS needs --cluster-cert, --cluster-key and --cluster-ca together");
  }
  const auto certificate = ReadFile(options.certificate);
  const auto private_key = ReadFile(options.private_key);
  const auto ca = ReadFile(options.ca);
  for (const auto* file : {&certificate, &private_key, &ca}) {
    if (!file->ok()) return file->status();
  }
  grpc::SslServerCredentialsOptions ssl(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  ssl.pem_root_certs = *ca;
  ssl.pem_key_cert_pairs.push_back({*private_key, *certificate});
  return grpc::SslServerCredentials(ssl);
}

absl::Status CheckClusterToken(const grpc::CallbackServerContext& context,
                               const std::string& token) {
  if (token.empty()) return absl::OkStatus();
  const auto found = context.client_metadata().find("authorization");
  if (found == context.client_metadata().end())
    return absl::UnauthenticatedError("the cluster token is missing");
  const std::string expected = absl::StrCat("Bearer ", token);
  const grpc::string_ref given = found->second;
  unsigned difference = given.size() == expected.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    difference |= static_cast<unsigned char>(given.data()[i]) ^
                  static_cast<unsigned char>(expected[i % expected.size()]);
  }
  return difference == 0 ? absl::OkStatus()
                         : absl::UnauthenticatedError("the cluster token is wrong");
}

}  // namespace switchyard

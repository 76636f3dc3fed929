//! Errors, written for the person who will read them in a stack event: what was being done, to what, what went
//! wrong, what to do next.

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::display::DisplayErrorContext;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use std::fmt::{self, Display};

/// Why something could not be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One or two sentences for the stack event.
    pub reason: String,
    /// The service's error code, where AWS answered with one.
    pub code: Option<String>,
    /// Whether the same call may succeed a minute later: AWS did not answer, throttled, or had an error of its own.
    pub transient: bool,
}

impl Failure {
    /// A failure that trying again does not mend.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), code: None, transient: false }
    }

    /// What an AWS call answered. `doing` says what was attempted, to what: "starting a build of project hail".
    ///
    /// The SDK has already retried (three attempts) what it considers worth it.
    pub fn aws<E>(doing: impl Display, error: SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let code = error.code().map(str::to_owned);
        let transient = match &error {
            SdkError::ServiceError(error) => {
                error.raw().status().is_server_error() || code.as_deref().is_some_and(is_transient)
            }
            SdkError::ConstructionFailure(_) => false,
            _ => true,
        };
        let why = match (&code, error.message()) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.clone(),
            _ => format!("AWS gave no usable answer ({})", DisplayErrorContext(&error)),
        };
        Self { reason: format!("{doing} failed: {why}"), code, transient }
    }

    /// What AWS answered about one of the many things that a call was about.
    pub fn answered(doing: impl Display, code: Option<&str>, message: Option<&str>) -> Self {
        let code = code.unwrap_or("no code");
        let transient = is_transient(code);
        let reason = format!("{doing} failed: {code}: {}", message.unwrap_or("no message"));
        Self { reason, code: Some(code.to_owned()), transient }
    }

    /// Whether AWS answered with one of these error codes.
    pub fn is(&self, codes: &[&str]) -> bool {
        self.code.as_deref().is_some_and(|code| codes.contains(&code))
    }
}

impl Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.reason)
    }
}

impl std::error::Error for Failure {}

/// Codes by which AWS says "later", in any service.
fn is_transient(code: &str) -> bool {
    const MARKS: [&str; 7] =
        ["Throttl", "RequestTimeout", "TooManyRequests", "SlowDown", "RequestLimitExceeded", "Internal", "Unavailable"];
    MARKS.iter().any(|mark| code.contains(mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttling_and_errors_of_aws_itself_are_transient_and_refusals_are_not() {
        for code in ["ThrottlingException", "SlowDown", "InternalServerException", "ServiceUnavailable"] {
            assert!(is_transient(code), "{code}");
        }
        for code in ["AccessDenied", "ValidationException", "NoSuchBucket", "ResourceNotFoundException"] {
            assert!(!is_transient(code), "{code}");
        }
    }
}

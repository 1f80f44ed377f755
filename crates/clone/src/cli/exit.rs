//! The exit codes of the command.

use clone_api::{ApiError, ErrorCode};

/// A failure without a code of its own.
pub(super) const FAILURE: u8 = 1;
/// The command line, the configuration or the request is wrong.
pub(super) const USAGE: u8 = 2;
/// There is no such VM.
pub(super) const NOT_FOUND: u8 = 3;
/// The VM is in a state that does not allow it, or the name is taken.
pub(super) const CONFLICT: u8 = 4;
/// This host cannot do it.
pub(super) const HOST: u8 = 5;
/// The VM lacks the device, or its guest the agent.
pub(super) const UNAVAILABLE: u8 = 6;
/// A time limit has passed.
pub(super) const TIMEOUT: u8 = 124;

/// The table as the help shows it.
pub(super) const HELP: &str = "\
Exit codes:
  0    done
  1    failed
  2    wrong usage or configuration
  3    there is no such VM
  4    not in this state, or the name is taken
  5    this host cannot do it, or has no room for it
  6    the VM lacks the device, or its guest the agent
  124  not in time
  exec and shell end with the code of the guest's command; 125 where clone itself
  failed, 126 where the command could not be run, 127 where there is none.";

/// The exit code for an error.
pub(super) fn code_of(error: &ApiError) -> u8 {
    match error.code {
        ErrorCode::BadRequest | ErrorCode::InvalidConfig => USAGE,
        ErrorCode::NotFound => NOT_FOUND,
        ErrorCode::Conflict => CONFLICT,
        ErrorCode::HostUnsupported | ErrorCode::OutOfSpace => HOST,
        ErrorCode::Unavailable => UNAVAILABLE,
        ErrorCode::Timeout => TIMEOUT,
        ErrorCode::MethodNotAllowed | ErrorCode::TooLarge | ErrorCode::Internal => FAILURE,
    }
}

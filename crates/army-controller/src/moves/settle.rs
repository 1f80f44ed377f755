//! What has become of a move: both hosts are asked until it is known.
//!
//! A host that does not answer may have the VM. Only what both say together, or one of them says for
//! certain, decides.

use std::time::Duration;

use army_node_api::requests::{InspectMoveRequest, MoveDecision, MoveStatus, Presence, SentVm};

use super::Attempt;
use crate::{Controller, Error, ErrorKind, Result, deadlines};

/// How often hosts are asked.
const ASK: Duration = Duration::from_millis(500);

/// What has become of a move.
#[derive(Debug)]
pub(super) enum Settled {
    /// The VM is at the destination.
    Moved(SentVm),
    /// The VM is at the source, for this reason.
    Stayed(Error),
    /// The VM was destroyed meanwhile.
    Over,
}

/// What follows from the answers of both hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is not decided yet.
    Wait,
    /// The destination has the VM.
    IsThere,
    /// The destination has all of the VM, and the source does not run it: the destination is to run it.
    RunsThere,
    /// The source has the VM.
    Stays,
}

impl Controller {
    /// Asks both hosts what has become of a move whose source has answered `sent`, until it is known.
    /// The destination then either runs the VM, or will not.
    pub(super) async fn settle(
        &self,
        operation: &str,
        attempt: &Attempt,
        sent: Result<SentVm>,
    ) -> Result<Settled> {
        loop {
            if !self.store.move_of(&attempt.vm).await?.wanted {
                return Ok(Settled::Over);
            }
            // The source first. Where it says that the guest runs there, it may have left since, and then
            // the destination says so.
            let source = self.ask(&attempt.from, &attempt.vm).await;
            let there = self.ask(&attempt.to, &attempt.vm).await;
            let told = match verdict(attempt.epoch, source.as_ref().ok(), there.as_ref().ok()) {
                Verdict::IsThere => return Ok(Settled::Moved(sent.unwrap_or_default())),
                Verdict::RunsThere => {
                    let run = MoveDecision::Here;
                    let told = self.tell(&attempt.to, &attempt.vm, attempt.epoch, run);
                    told.await
                        .map(|()| Settled::Moved(sent.clone().unwrap_or_default()))
                }
                Verdict::Stays => {
                    let clean = MoveDecision::Elsewhere;
                    let told = self.tell(&attempt.to, &attempt.vm, attempt.epoch, clean);
                    let stayed = || {
                        let reason = reason(&source, &there);
                        let error = sent.clone().err().unwrap_or_else(|| {
                            Error::new(ErrorKind::Internal, "the VM did not leave its host")
                        });
                        Settled::Stayed(with_reason(error, reason))
                    };
                    match told.await {
                        // A destination that does not answer cannot run the VM, which was not given to it.
                        // Its reports show that it does not know, and it is told then.
                        Err(error) if is_silence(&error) => Ok(stayed()),
                        told => told.map(|()| stayed()),
                    }
                }
                Verdict::Wait => Err(waits_for(attempt, &source, &there)),
            };
            match told {
                Ok(settled) => return Ok(settled),
                Err(error) => {
                    let progress = error.message;
                    self.store.set_progress(operation, &progress).await?;
                }
            }
            tokio::time::sleep(ASK).await;
        }
    }

    async fn ask(&self, host: &str, vm: &str) -> Result<MoveStatus> {
        let node = self.node(host)?;
        let request = InspectMoveRequest { vm: vm.to_owned() };
        let limit = deadlines::question(node.as_ref());
        Ok(node.inspect_move(request, limit).await?)
    }
}

/// What both hosts say about the move of `epoch`; `None` of a host that does not answer.
fn verdict(epoch: u64, source: Option<&MoveStatus>, there: Option<&MoveStatus>) -> Verdict {
    use Presence::{Absent, Arrived, Ended, Here, Left, Moved, Receiving, Sending, Unknown};
    // What a host knows of a former move of the VM is about that move.
    let there = there.map(|status| match status.epoch == epoch {
        true => status.presence,
        false => Absent,
    });
    let source = source.map(|status| status.presence);
    match (source, there) {
        // A VM that has ended there was there.
        (_, Some(Here | Ended)) => Verdict::IsThere,
        (Some(Sending | Receiving | Unknown), _) | (_, Some(Receiving | Sending | Unknown)) => {
            Verdict::Wait
        }
        (Some(Here | Ended), _) => Verdict::Stays,
        (Some(Moved | Left | Absent | Arrived), Some(Arrived)) => Verdict::RunsThere,
        (Some(Moved | Left | Absent | Arrived), Some(Absent | Moved | Left)) => Verdict::Stays,
        (None, Some(Absent | Moved | Left)) => Verdict::Stays,
        (None, Some(Arrived)) | (_, None) => Verdict::Wait,
    }
}

/// Why a VM stays where it was, as its hosts know it.
fn reason(source: &Result<MoveStatus>, there: &Result<MoveStatus>) -> Option<String> {
    let of = |status: &Result<MoveStatus>| status.as_ref().ok().and_then(|it| it.reason.clone());
    of(there).or_else(|| of(source))
}

/// The error of a move, with what its hosts know of it where the error itself does not say it.
fn with_reason(error: Error, reason: Option<String>) -> Error {
    match reason {
        Some(reason) if !error.message.contains(&reason) => Error {
            message: format!("{}: {reason}", error.message),
            ..error
        },
        _ => error,
    }
}

fn is_silence(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::HostUnavailable | ErrorKind::Timeout)
}

fn waits_for(attempt: &Attempt, source: &Result<MoveStatus>, there: &Result<MoveStatus>) -> Error {
    let message = match (source, there) {
        (Err(error), _) => format!("waits for {}: {}", attempt.from, error.message),
        (_, Err(error)) => format!("waits for {}: {}", attempt.to, error.message),
        (Ok(status), _) => match status.sent_bytes {
            Some(bytes) => format!(
                "is sent from {} to {}, {} MiB so far",
                attempt.from,
                attempt.to,
                bytes >> 20
            ),
            None => format!("is sent from {} to {}", attempt.from, attempt.to),
        },
    };
    Error::new(ErrorKind::HostUnavailable, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(presence: Presence, epoch: u64) -> MoveStatus {
        MoveStatus {
            presence,
            epoch,
            departure: None,
            reason: None,
            sent_bytes: None,
        }
    }

    #[test]
    fn a_vm_runs_at_one_host_by_what_both_say_and_nobody_guesses() {
        use Presence::{Absent, Arrived, Ended, Here, Left, Moved, Receiving, Sending};
        use Verdict::{IsThere, RunsThere, Stays, Wait};
        for (source, there, expected) in [
            (Some(Here), Some(Absent), Stays),
            // The source did not hear that all of it has arrived.
            (Some(Here), Some(Arrived), Stays),
            (Some(Here), Some(Receiving), Wait),
            (Some(Here), None, Stays),
            (Some(Sending), Some(Receiving), Wait),
            (Some(Sending), Some(Arrived), Wait),
            (Some(Sending), None, Wait),
            // It was given away, and the destination did not hear it.
            (Some(Moved), Some(Arrived), RunsThere),
            (Some(Left), Some(Arrived), RunsThere),
            (Some(Absent), Some(Arrived), RunsThere),
            // It was given away, and is not there any more: the source has it still.
            (Some(Moved), Some(Absent), Stays),
            (Some(Moved), None, Wait),
            (Some(Left), Some(Absent), Stays),
            (Some(Left), None, Wait),
            (Some(Moved), Some(Here), IsThere),
            (Some(Sending), Some(Here), IsThere),
            (Some(Left), Some(Ended), IsThere),
            (None, Some(Here), IsThere),
            // The source may go on with it.
            (None, Some(Arrived), Wait),
            (None, Some(Absent), Stays),
            (None, None, Wait),
            (Some(Ended), Some(Arrived), Stays),
            (Some(Ended), Some(Absent), Stays),
        ] {
            let source_status = source.map(|presence| status(presence, 1));
            let there_status = there.map(|presence| status(presence, 2));
            let found = verdict(2, source_status.as_ref(), there_status.as_ref());
            assert_eq!(found, expected, "{source:?} {there:?}");
        }
        // What the destination knows of a former move is not about this one.
        let former = verdict(4, Some(&status(Here, 3)), Some(&status(Here, 2)));
        assert_eq!(former, Stays);
    }
}

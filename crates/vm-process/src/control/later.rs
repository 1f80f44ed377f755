//! Answers that other threads give, which the event loop sends to the clients.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use clone_api::ApiError;
use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::http::Response;

/// An answer, which goes to the connection of this id.
pub(super) struct Answer {
    pub(super) id: u64,
    pub(super) response: Response,
    /// What is done when the answer was sent, or its client is gone.
    pub(super) then: Option<Then>,
}

type Then = Box<dyn FnOnce() + Send>;

struct Shared {
    /// Threads push answers and the event loop takes them all; each holds the lock for that only.
    answers: Mutex<Vec<Answer>>,
    fd: EventFd,
}

/// The event loop's side, which takes the answers.
pub(super) struct Later {
    shared: Arc<Shared>,
    next_id: u64,
}

impl Later {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                answers: Mutex::new(Vec::new()),
                fd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            }),
            next_id: 0,
        })
    }

    /// An eventfd that is readable while there are answers.
    pub(super) fn fd(&self) -> &EventFd {
        &self.shared.fd
    }

    /// Returns an id for a new connection.
    pub(super) fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Makes the responder for the connection `id`.
    pub(super) fn responder(&self, id: u64) -> Responder {
        Responder {
            shared: Arc::clone(&self.shared),
            id,
            answered: false,
        }
    }

    /// Takes the answers given so far.
    pub(super) fn take(&self) -> Vec<Answer> {
        let _ = self.shared.fd.read();
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Answer>> {
        self.shared
            .answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers one request, from any thread. If it is dropped without an answer, as by a panic, the
/// client receives an error.
pub struct Responder {
    shared: Arc<Shared>,
    id: u64,
    answered: bool,
}

impl Responder {
    /// Sends the answer.
    pub fn answer<T: Serialize>(self, result: Result<T, ApiError>) {
        self.encode(result, None);
    }

    /// Sends the answer, and calls `then` in the event loop afterwards, whether or not the client
    /// still waits.
    pub fn answer_last<T: Serialize>(
        self,
        result: Result<T, ApiError>,
        then: impl FnOnce() + Send + 'static,
    ) {
        self.encode(result, Some(Box::new(then)));
    }

    fn encode<T: Serialize>(mut self, result: Result<T, ApiError>, then: Option<Then>) {
        let encoded = result.and_then(|value| {
            serde_json::to_vec(&value).map_err(|error| ApiError::internal(&error))
        });
        let response = match encoded {
            Ok(body) => Response {
                status: 200,
                body: Some(body),
                allow: None,
            },
            Err(error) => Response::error(&error),
        };
        self.send(response, then);
    }

    fn send(&mut self, response: Response, then: Option<Then>) {
        self.answered = true;
        let answer = Answer {
            id: self.id,
            response,
            then,
        };
        self.shared
            .answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(answer);
        // The counter cannot overflow: the event loop empties it.
        let _ = self.shared.fd.write(1);
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            let error = ApiError::new(
                clone_api::ErrorCode::Internal,
                "the VM's process gave up in the middle; its log tells why",
            );
            self.send(Response::error(&error), None);
        }
    }
}

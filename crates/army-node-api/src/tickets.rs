//! Tickets with which one node may fetch a template from another.
//!
//! The controller chooses the ticket. It tells it to the node that has the template, and to the one
//! that fetches it. A node that the controller has not sent gets no template of another host.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::requests::AdmitFetchRequest;
use crate::{Error, ErrorKind, Result};

/// The header of a request with its ticket.
pub(crate) const TICKET_HEADER: &str = "army-ticket";
/// The longest time that a ticket can be valid.
const MAX_VALIDITY: Duration = Duration::from_secs(3600);
/// The most tickets that are kept.
const MAX_TICKETS: usize = 10_000;
/// The fewest characters of a ticket.
const MIN_LEN: usize = 32;

/// The tickets that a node accepts.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<String, Ticket>>);

struct Ticket {
    template: String,
    id: String,
    host: String,
    until: Instant,
}

impl Tickets {
    /// Accepts a ticket of the controller from now on.
    pub(crate) fn admit(&self, request: AdmitFetchRequest) -> Result<()> {
        let invalid = |message: &str| Error::new(ErrorKind::InvalidRequest, message);
        if request.ticket.len() < MIN_LEN {
            return Err(invalid("the ticket is too short"));
        }
        let now = Instant::now();
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| ticket.until > now);
        if tickets.len() >= MAX_TICKETS {
            return Err(Error::new(
                ErrorKind::Exhausted,
                "there are too many tickets",
            ));
        }
        let validity = Duration::from_secs(request.valid_s).min(MAX_VALIDITY);
        let ticket = Ticket {
            template: request.template,
            id: request.id,
            host: request.host,
            until: now + validity,
        };
        tickets.insert(request.ticket, ticket);
        Ok(())
    }

    /// Checks that `host` may fetch a template with a ticket, and returns the id that the template
    /// must have.
    pub(crate) fn check(&self, ticket: Option<&str>, host: &str, template: &str) -> Result<String> {
        let tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ticket
            .and_then(|ticket| tickets.get(ticket))
            .filter(|it| it.host == host && it.template == template && it.until > Instant::now())
            .map(|it| it.id.clone())
            .ok_or_else(|| {
                let message = "the controller has not permitted this host to fetch the template";
                Error::new(ErrorKind::PermissionDenied, message)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ticket: &str, valid_s: u64) -> AdmitFetchRequest {
        AdmitFetchRequest {
            ticket: ticket.repeat(MIN_LEN),
            template: "t".to_owned(),
            id: "1".to_owned(),
            host: "b".to_owned(),
            valid_s,
        }
    }

    #[test]
    fn a_ticket_is_for_one_host_and_one_template_and_expires() {
        let tickets = Tickets::default();
        tickets.admit(request("a", 60)).unwrap();
        let ticket = "a".repeat(MIN_LEN);
        let check = |ticket, host, template| tickets.check(ticket, host, template);
        assert_eq!(check(Some(&ticket), "b", "t").unwrap(), "1");
        for (ticket, host, template) in [
            (None, "b", "t"),
            (Some("guess"), "b", "t"),
            (Some(ticket.as_str()), "c", "t"),
            (Some(ticket.as_str()), "b", "u"),
        ] {
            let refused = check(ticket, host, template).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::PermissionDenied);
        }
        tickets.admit(request("z", 0)).unwrap();
        let expired = "z".repeat(MIN_LEN);
        check(Some(&expired), "b", "t").unwrap_err();
        let mut short = request("a", 60);
        short.ticket = "a".to_owned();
        let refused = tickets.admit(short).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::InvalidRequest);
    }
}

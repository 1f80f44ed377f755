//! Tickets with which one node may fetch a template from another, or send it a VM.
//!
//! The controller chooses the ticket. It tells it to the node that has the template, and to the one
//! that fetches it; or to the node that receives a VM, and to the one that sends it. A node that the
//! controller has not sent gets no template of another host, and sends it nothing.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::requests::{AdmitFetchRequest, ExpectVmRequest};
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
    permits: Permitted,
    host: String,
    until: Instant,
}

/// What a ticket is for.
enum Permitted {
    /// To fetch this template, as often as it takes.
    Template { name: String, id: String },
    /// To send this VM, once.
    Vm(String),
}

impl Tickets {
    /// Accepts a ticket of the controller for a template from now on.
    pub(crate) fn admit(&self, request: AdmitFetchRequest) -> Result<()> {
        let permits = Permitted::Template {
            name: request.template,
            id: request.id,
        };
        self.add(request.ticket, request.host, permits, request.valid_s)
    }

    /// Accepts a ticket of the controller for a VM from now on.
    pub(crate) fn expect(&self, request: &ExpectVmRequest) -> Result<()> {
        let permits = Permitted::Vm(request.vm.id.clone());
        let (ticket, host) = (request.ticket.clone(), request.from.clone());
        self.add(ticket, host, permits, request.valid_s)
    }

    fn add(&self, ticket: String, host: String, permits: Permitted, valid_s: u64) -> Result<()> {
        let invalid = |message: &str| Error::new(ErrorKind::InvalidRequest, message);
        if ticket.len() < MIN_LEN {
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
        let validity = Duration::from_secs(valid_s).min(MAX_VALIDITY);
        let accepted = Ticket {
            permits,
            host,
            until: now + validity,
        };
        tickets.insert(ticket, accepted);
        Ok(())
    }

    /// Checks that `host` may fetch a template with a ticket, and returns the id that the template
    /// must have.
    pub(crate) fn check(&self, ticket: Option<&str>, host: &str, template: &str) -> Result<String> {
        let tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ticket
            .and_then(|ticket| tickets.get(ticket))
            .filter(|it| it.host == host && it.until > Instant::now())
            .and_then(|it| match &it.permits {
                Permitted::Template { name, id } if name == template => Some(id.clone()),
                _ => None,
            })
            .ok_or_else(|| {
                let message = "the controller has not permitted this host to fetch the template";
                Error::new(ErrorKind::PermissionDenied, message)
            })
    }

    /// Checks that `host` may send a VM with a ticket, which is used up then.
    pub(crate) fn redeem(&self, ticket: Option<&str>, host: &str, vm: &str) -> Result<()> {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_valid = |it: &Ticket| {
            let is_for_vm = matches!(&it.permits, Permitted::Vm(id) if id == vm);
            is_for_vm && it.host == host && it.until > Instant::now()
        };
        let known = ticket.filter(|ticket| tickets.get(*ticket).is_some_and(is_valid));
        match known.and_then(|ticket| tickets.remove(ticket)) {
            Some(_) => Ok(()),
            None => {
                let message = "the controller has not permitted this host to send the VM";
                Err(Error::new(ErrorKind::PermissionDenied, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use army_api::vms::VmState;

    use super::*;
    use crate::requests::VmSpec;

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
    #[test]
    fn a_ticket_for_a_vm_works_once_for_one_host_and_for_no_template() {
        let tickets = Tickets::default();
        let ticket = "v".repeat(MIN_LEN);
        let request = ExpectVmRequest {
            vm: VmSpec::new("1".to_owned(), 2, "a".to_owned()),
            revision: 0,
            then: VmState::Running,
            ceiling: None,
            template_id: "t-id".to_owned(),
            template: "t".to_owned(),
            from: "b".to_owned(),
            ticket: ticket.clone(),
            valid_s: 60,
        };
        tickets.expect(&request).unwrap();
        for (ticket, host, vm) in [
            (None, "b", "1"),
            (Some("guess"), "b", "1"),
            (Some(ticket.as_str()), "c", "1"),
            (Some(ticket.as_str()), "b", "2"),
        ] {
            let refused = tickets.redeem(ticket, host, vm).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::PermissionDenied);
        }
        tickets.check(Some(&ticket), "b", "t").unwrap_err();
        tickets.redeem(Some(&ticket), "b", "1").unwrap();
        tickets.redeem(Some(&ticket), "b", "1").unwrap_err();
        // A ticket for a template is none for a VM.
        tickets.admit(self::request("a", 60)).unwrap();
        let ticket = "a".repeat(MIN_LEN);
        tickets.redeem(Some(&ticket), "b", "t").unwrap_err();
    }
}

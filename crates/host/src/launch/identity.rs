//! Gives a clone its own identity, through its agent.
//!
//! A clone resumes with its template's name, addresses, machine id, keys and time. The new
//! generation id makes its kernel reseed its random number generator; the agent changes the rest,
//! as this module tells it.

use std::io;
use std::time::{Duration, Instant};

use agent_proto::client::{ClientError, Connection, Deadline};
use agent_proto::messages::{Identity, Interface};
use clone_api::{ApiError, ErrorCode};
use clone_start::error::Result;
use clone_start::vm_dir::GuestInterface;

use crate::runtime::RunningVm;

/// The time limits for a clone's agent.
struct Limits {
    /// The limit for the greeting. The agent was running when the template was made.
    greeting: Duration,
    /// The limit for applying the identity afterwards.
    work: Duration,
}

const LIMITS: Limits = Limits {
    greeting: Duration::from_secs(30),
    work: Duration::from_secs(120),
};
/// The pause before another attempt.
const PAUSE: Duration = Duration::from_millis(20);

/// Gives a clone its own identity; `name` is its host name. Returns notices about the parts that
/// its guest could not apply.
///
/// # Errors
/// [`ErrorCode::Unavailable`] if the agent does not answer, or if the clone would share a secret or
/// an address with another.
pub fn give(vm: &RunningVm, name: &str) -> Result<Vec<String>> {
    give_within(&LIMITS, vm, name)
}

fn give_within(limits: &Limits, vm: &RunningVm, name: &str) -> Result<Vec<String>> {
    let interfaces = vm.dir.guest_network()?;
    let failed = |error: ClientError| {
        ApiError::new(
            ErrorCode::Unavailable,
            format!("the clone `{name}` could not be given its identity: {error}"),
        )
        .advise("make the template of a guest whose agent runs, or fork with --no-identity")
    };
    apply(limits, vm, || identity(name, &interfaces), failed)
}

/// Sets the clock of a VM that was resumed, and the addresses of its interfaces where they are not
/// the `former` ones. Returns notices about the parts that its guest could not apply.
///
/// # Errors
/// [`ErrorCode::Unavailable`] if the agent does not answer.
pub fn go_on(vm: &RunningVm, former: &[GuestInterface]) -> Result<Vec<String>> {
    let interfaces = vm.dir.guest_network()?;
    let changed = interfaces != former;
    let update = || {
        let (interfaces, dns) = match changed {
            true => settings(&interfaces),
            false => (Vec::new(), Vec::new()),
        };
        Ok(Identity {
            clock_ns: clone_base::clock::unix_ns(),
            interfaces,
            dns,
            ..Identity::default()
        })
    };
    let failed = |error: ClientError| {
        let message = format!("the guest's agent does not answer: {error}");
        ApiError::new(ErrorCode::Unavailable, message)
    };
    apply(&LIMITS, vm, update, failed)
}

/// Sends the guest what `identity` makes, again where the connection is lost.
fn apply(
    limits: &Limits,
    vm: &RunningVm,
    identity: impl Fn() -> io::Result<Identity>,
    failed: impl Fn(ClientError) -> ApiError,
) -> Result<Vec<String>> {
    let end = Instant::now() + limits.greeting;
    loop {
        let identity = identity().map_err(|error| ApiError::internal(&error))?;
        let greeting = Deadline::after(limits.greeting);
        let opened = Connection::open(&vm.dir.vsock_socket(), greeting);
        let given = opened.and_then(|mut connection| {
            connection.set_deadline(Deadline::after(limits.work));
            connection.set_identity(identity)
        });
        match given {
            // A guest that gets little CPU time may take the end of its template's connections for
            // the end of this one. The next attempt sends it a new identity.
            Err(ClientError::NoAgent | ClientError::Lost(_)) if Instant::now() < end => {
                if vm.process.wait(Some(PAUSE))? {
                    return given.map_err(failed);
                }
            }
            given => return given.map_err(failed),
        }
    }
}

fn identity(name: &str, interfaces: &[GuestInterface]) -> io::Result<Identity> {
    let machine_id: String = clone_base::random::bytes::<16>()?
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let (interfaces, dns) = settings(interfaces);
    let seed = clone_base::random::bytes::<32>()?.to_vec();
    Ok(Identity {
        hostname: host_name(name),
        machine_id,
        seed,
        clock_ns: clone_base::clock::unix_ns(),
        interfaces,
        dns,
        new_ssh_host_keys: true,
    })
}

/// The settings of a guest's interfaces, and its name servers.
fn settings(interfaces: &[GuestInterface]) -> (Vec<Interface>, Vec<String>) {
    let mut dns = Vec::new();
    let mut settings = Vec::new();
    for (index, interface) in interfaces.iter().enumerate() {
        let mut setting = Interface {
            mac: interface.mac.to_string(),
            ..Interface::default()
        };
        // As at boot, the first interface has the default route.
        if let Some(address) = interface.address.as_ref().filter(|_| index == 0) {
            setting.address = format!("{}/{}", address.address, address.prefix);
            setting.gateway = address.gateway.to_string();
            dns = address
                .name_servers
                .iter()
                .map(ToString::to_string)
                .collect();
        }
        settings.push(setting);
    }
    (settings, dns)
}

/// Converts a VM's name to a host name, which may not contain `_`.
fn host_name(name: &str) -> String {
    name.replace('_', "-")
}

#[cfg(test)]
mod tests {
    use clone_api::MacAddr;

    use std::io::Write;

    use super::super::testing::{Act, FakeVm};
    use super::*;
    use clone_start::vm_dir::GuestAddress;

    #[test]
    fn siblings_are_told_different_things_and_only_the_first_interface_leads_out() {
        let address = GuestAddress {
            address: [10, 0, 0, 7].into(),
            prefix: 16,
            gateway: [10, 0, 0, 1].into(),
            name_servers: vec![[10, 0, 0, 1].into()],
        };
        let interface = GuestInterface {
            mac: MacAddr([2, 0, 0, 0, 0, 7]),
            address: Some(address),
        };
        let interfaces = [interface.clone(), interface];
        let (a, b) = (
            identity("a_1", &interfaces).unwrap(),
            identity("b", &interfaces).unwrap(),
        );
        assert_eq!(a.hostname, "a-1");
        assert_ne!(a.machine_id, b.machine_id);
        assert_ne!(a.seed, b.seed);
        assert_eq!(a.interfaces[0].address, "10.0.0.7/16");
        assert_eq!(a.interfaces[1].address, "");
        assert_eq!(a.dns, ["10.0.0.1"]);
    }

    #[test]
    fn an_agent_that_drips_or_floods_ends_the_fork_and_nothing_else() {
        let drip: Act = |stream| {
            std::thread::sleep(Duration::from_millis(20));
            stream.write_all(&[0])
        };
        // The flood completes the message that the greeting began, which is not a valid one.
        let flood: Act = |stream| stream.write_all(&[0; 64 << 10]);
        for act in [drip, flood] {
            let vm = FakeVm::new(vec![0, 0, 8, 0], act);
            let begun = Instant::now();
            let limits = Limits {
                greeting: Duration::from_secs(10),
                work: Duration::from_millis(200),
            };
            let failed = give_within(&limits, &vm.running(), "b").unwrap_err();
            assert_eq!(failed.code, ErrorCode::Unavailable);
            assert!(begun.elapsed() < Duration::from_secs(8));
        }
    }
}

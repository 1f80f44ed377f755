//! What a caller may open of a VM's network. (What a tenant's policy permits is up to the controller.)

use army_api::keys::Role;
use army_api::vms::{Egress, NetworkPolicy};
use army_api::{Problem, ProblemKind};
use clone_api::Ipv4Network;

use super::Failure;
use super::auth::Caller;

/// Checks that a caller may ask for a network policy: only administrators open link-local addresses,
/// where a cloud's metadata service gives away the host's credentials, and the host's own addresses.
pub(super) fn check(caller: &Caller, network: Option<&NetworkPolicy>) -> Result<(), Failure> {
    let is_admin = caller.may(Role::Admin).is_ok();
    if network.is_some_and(|policy| policy.host) && !is_admin {
        let detail = "only administrators open the host's own addresses";
        return Err(Problem::new(ProblemKind::Forbidden, detail).into());
    }
    match network.and_then(|policy| link_local(&policy.egress)) {
        Some(network) if !is_admin => {
            let detail =
                format!("only administrators open link-local addresses, such as `{network}`");
            Err(Problem::new(ProblemKind::Forbidden, detail).into())
        }
        _ => Ok(()),
    }
}

/// A network of the policy that lies within 169.254.0.0/16.
fn link_local(egress: &Egress) -> Option<&str> {
    let Egress::Allow(networks) = egress else {
        return None;
    };
    let is_link_local = |text: &&String| {
        let network: Option<Ipv4Network> = text.parse().ok();
        network.is_some_and(Ipv4Network::is_link_local)
    };
    networks.iter().find(is_link_local).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_opens_link_local_addresses_only_by_naming_them() {
        let allow = |text: &str| Egress::Allow(vec!["10.0.0.0/8".to_owned(), text.to_owned()]);
        for text in ["169.254.169.254/32", "169.254.0.0/16"] {
            assert_eq!(link_local(&allow(text)), Some(text));
        }
        for text in ["0.0.0.0/0", "169.0.0.0/8", "169.253.0.0/16", "nonsense"] {
            assert_eq!(link_local(&allow(text)), None);
        }
        assert_eq!(link_local(&Egress::Full), None);
    }
}

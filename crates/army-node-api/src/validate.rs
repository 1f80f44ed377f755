//! Rules for names and policies that come from clients. The controller applies them to refuse a
//! request early, and the node applies them again.

use army_api::vms::{Egress, NetworkPolicy};
use clone_api::Ipv4Network;
use clone_api::config::Egress as HostEgress;

use crate::{Error, ErrorKind, Result};

/// Checks the name of a template. A name is never a path: clients do not choose where on a host a
/// template is looked for.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`].
pub fn check_template_name(name: &str) -> Result<()> {
    if clone_api::validate::is_valid_name(name) {
        return Ok(());
    }
    let message = format!("invalid template name `{}`", name.escape_debug());
    Err(Error::new(ErrorKind::InvalidRequest, message))
}

/// The destinations that a network policy permits, in the terms of a VM's description.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where the policy names something that is not a network, or too
/// many networks.
pub fn egress(policy: &NetworkPolicy) -> Result<HostEgress> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidRequest, message);
    Ok(match &policy.egress {
        Egress::Full => HostEgress::Full,
        Egress::None => HostEgress::None,
        Egress::Allow(networks) if networks.len() > HostEgress::MAX_NETWORKS => {
            let most = HostEgress::MAX_NETWORKS;
            return Err(invalid(format!(
                "{} networks are allowed, and {most} can be",
                networks.len()
            )));
        }
        Egress::Allow(networks) => {
            let networks = networks.iter().map(|it| it.parse::<Ipv4Network>());
            let networks: std::result::Result<_, _> = networks.collect();
            HostEgress::Allow(networks.map_err(|error| invalid(error.to_string()))?)
        }
    })
}

/// What a network policy permits within that of a tenant: what both permit. Link-local addresses are
/// open only where the policy itself names them.
///
/// # Errors
/// [`ErrorKind::InvalidRequest`] where a policy is invalid, or both together are too many networks.
pub fn narrowed(policy: &NetworkPolicy, ceiling: &NetworkPolicy) -> Result<NetworkPolicy> {
    let both = egress(policy)?.narrowed_by(&egress(ceiling)?);
    let both = both.map_err(|error| {
        let message = format!("the tenant's policy limits egress, too: {error}");
        Error::new(ErrorKind::InvalidRequest, message).advise("allow fewer networks")
    })?;
    Ok(NetworkPolicy {
        egress: match both {
            HostEgress::Full => Egress::Full,
            HostEgress::None => Egress::None,
            HostEgress::Allow(networks) => {
                Egress::Allow(networks.iter().map(ToString::to_string).collect())
            }
        },
        host: policy.host && ceiling.host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_networks_and_not_too_many() {
        let allow = |networks: Vec<String>| {
            egress(&NetworkPolicy {
                egress: Egress::Allow(networks),
                host: false,
            })
        };
        let host = allow(vec!["10.0.0.0/8".into(), "192.0.2.7".into()]).unwrap();
        let HostEgress::Allow(networks) = host else {
            panic!("{host:?}")
        };
        assert_eq!(networks[1].to_string(), "192.0.2.7/32");
        for wrong in ["10.0.0.1/8", "example.org", "::/0"] {
            let error = allow(vec![wrong.into()]).unwrap_err();
            assert!(error.message.contains(wrong), "{error}");
        }
        assert!(allow(vec!["10.0.0.0/8".into(); 65]).is_err());
    }
}

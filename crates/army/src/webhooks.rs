//! Sends events to webhooks: signed, without redirects, and not to the insides of a network.
//!
//! What users' webhooks lead to is looked up once, and refused where it is not a public address: the
//! connection is made to the address that was checked, so that a name that changes in between leads
//! nowhere else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use army_api::webhooks::{DELIVERY_HEADER, SIGNATURE_HEADER};
use army_controller::{Delivery, WebhookSender};
use army_node_api::remote::causes;
use army_node_api::time::now_ms;
use futures_util::future::BoxFuture;
use hmac::{Hmac, KeyInit, Mac};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, Url, redirect};
use sha2::Sha256;

/// How long a delivery may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Sends events over HTTP.
pub struct HttpSender {
    /// For webhooks of administrators, which may lead anywhere.
    trusted: Client,
    /// For webhooks of users.
    guarded: Client,
}

fn base() -> reqwest::ClientBuilder {
    Client::builder()
        .timeout(LIMIT)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .user_agent(concat!("army/", env!("CARGO_PKG_VERSION")))
}

impl HttpSender {
    /// # Errors
    /// Where HTTP cannot be set up.
    pub fn new() -> reqwest::Result<Self> {
        // An error means that a provider is already installed, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // A minimal system has no certificates, and can still send to http URLs.
        let build = |builder: fn() -> reqwest::ClientBuilder| {
            let built = builder().build();
            built.or_else(|_| builder().tls_certs_only([]).build())
        };
        Ok(Self {
            trusted: build(base)?,
            guarded: build(|| base().dns_resolver(Arc::new(PublicOnly)))?,
        })
    }

    async fn post(&self, delivery: Delivery) -> Result<(), String> {
        check_url(&delivery.url, delivery.is_trusted)?;
        let client = match delivery.is_trusted {
            true => &self.trusted,
            false => &self.guarded,
        };
        let body = serde_json::to_vec(&delivery.event).map_err(|error| error.to_string())?;
        let signature = signature(&delivery.secret, now_ms() / 1000, &body)?;
        let answer = client
            .post(&delivery.url)
            .header("content-type", "application/json")
            .header("army-webhook", &delivery.webhook)
            .header("army-event", delivery.event.id.to_string())
            .header(DELIVERY_HEADER, delivery.id())
            .header(SIGNATURE_HEADER, signature)
            .body(body)
            .send()
            .await
            .map_err(|error| causes(&error))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            status => Err(format!("the answer was {status}")),
        }
    }
}

impl WebhookSender for HttpSender {
    fn send(&self, delivery: Delivery) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(self.post(delivery))
    }
}

/// The signature of a body, as the header has it.
fn signature(secret: &str, seconds: u64, body: &[u8]) -> Result<String, String> {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes());
    let mut mac = mac.map_err(|error| error.to_string())?;
    mac.update(format!("{seconds}.").as_bytes());
    mac.update(body);
    let digest = mac.finalize().into_bytes();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("t={seconds},v1={hex}"))
}

/// Checks what can be said of a URL without looking its host up. A host that is an address is not
/// looked up later, either.
///
/// # Errors
/// Why nothing can be sent there, as a sentence.
pub fn check_url(url: &str, is_trusted: bool) -> Result<(), String> {
    let url = Url::parse(url).map_err(|error| format!("`url` cannot be read: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err("`url` must begin with https:// or http://".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("`url` must not have a user name or a password".to_owned());
    }
    let host = url.host_str().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let is_refused = match host.parse::<IpAddr>() {
        Ok(address) => !is_public(address),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    };
    match is_refused && !is_trusted {
        true => Err(format!("{host} is not a public address")),
        false => Ok(()),
    }
}

/// Whether an address is one of the public Internet, and neither this host's, nor its network's, nor
/// a cloud's for metadata.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => match embedded_v4(address) {
            Some(embedded) => is_public_v4(embedded),
            // Global unicast, without documentation and tunnels.
            None => {
                let [first, second, ..] = address.segments();
                (0x2000..0x4000).contains(&first)
                    && !(first == 0x2001 && second < 0x200)
                    && !(first == 0x2001 && second == 0xdb8)
            }
        },
    }
}

/// The IPv4 address that an IPv6 address stands for.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let segments = address.segments();
    let [.., high, low] = segments;
    let embedded = || Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match segments {
        [0x64, 0xff9b, ..] => Some(embedded()),
        [0x2002, high, low, ..] => {
            Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
        }
        _ => address.to_ipv4(),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let is_special = matches!(
        (a, b, c),
        (0 | 10 | 127 | 224..=255, _, _)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (192, 168, _)
            | (198, 18..=19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    );
    !is_special
}

/// Looks names up, and returns public addresses only.
struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|it| is_public(it.ip())).collect();
            if public.is_empty() {
                let message = format!("{} has no public address", name.as_str());
                return Err(message.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_that_of_openssl_over_time_and_body() {
        // Computed by:
        // printf '0.what do ya want for nothing?' | openssl dgst -sha256 -hmac Jefe
        let signed = signature("Jefe", 0, b"what do ya want for nothing?").unwrap();
        assert_eq!(signed, EXPECTED);
    }

    const EXPECTED: &str =
        "t=0,v1=37f471929915ccd2cbbe79feb84ffcff4f2bb25e15fc41c2506687331ae179cc";

    #[test]
    fn only_public_addresses_are_public() {
        for text in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "::127.0.0.1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "1.1.1.1",
            "172.32.0.1",
            "100.128.0.1",
            "2606:4700::1111",
            "64:ff9b::101:101",
        ] {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_public_url_is_refused_for_users() {
        for url in [
            "http://127.0.0.1/",
            "https://169.254.169.254/latest",
            "http://[::1]:80/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://localhost:7777/",
            "http://a.localhost/",
        ] {
            assert!(check_url(url, false).is_err(), "{url}");
            assert!(check_url(url, true).is_ok(), "{url}");
        }
        for url in [
            "ftp://example.org/",
            "file:///etc/passwd",
            "x",
            "https://a:b@example.org/",
        ] {
            assert!(check_url(url, true).is_err(), "{url}");
        }
        assert!(check_url("https://example.org/hook?x=1", false).is_ok());
    }
}

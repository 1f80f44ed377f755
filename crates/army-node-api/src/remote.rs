//! A host that is reached over the network: its node's API (`army_node::serve`), from outside.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_proto::client::{Connection, Deadline};
use army_api::vms::Balloon;
use army_api::{Problem, ProblemKind};
use futures_util::StreamExt;
use reqwest::header;
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::cluster::Member;
use crate::host::Host;
use crate::pipe::{self, Pieces, Sender};
use crate::{AGENT_PROTOCOL, InUse, Made, Origin, Report, Result, TemplateFacts, VmSpec, of_agent};

/// How long a host may take to be connected with.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// How long what was sent may go without being acknowledged.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a host may take to say how it is.
const REPORT_LIMIT: Duration = Duration::from_secs(10);
/// How long something with VMs may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How long a template may travel.
const FETCH_LIMIT: Duration = Duration::from_secs(3600);
/// How long an agent's greeting may take, once the node has it.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

/// VMs that are to be made.
#[derive(Serialize, Deserialize)]
pub struct Make<'a> {
    /// The template, or the VM that is forked.
    pub of: Cow<'a, str>,
    /// The VMs.
    pub entries: Cow<'a, [VmSpec]>,
}

impl<'a> Make<'a> {
    /// They, without copying.
    pub fn new(of: &'a str, entries: &'a [VmSpec]) -> Self {
        Self {
            of: of.into(),
            entries: entries.into(),
        }
    }
}

/// A host elsewhere.
pub struct Remote {
    name: String,
    address: SocketAddr,
    url: String,
    http: reqwest::Client,
    runtime: Handle,
}

impl Remote {
    /// The host `name`, whose node listens at `address`. Its methods are for threads that may
    /// block, and do their waiting in the runtime of whoever calls this.
    pub fn new(name: &str, address: SocketAddr, tls: ClientConfig) -> Result<Self> {
        let dns = Member::Node(name.to_owned()).dns_name();
        Ok(Self {
            name: name.to_owned(),
            address,
            url: format!("https://{dns}:{}", address.port()),
            http: client(&dns, address, tls)?,
            runtime: Handle::current(),
        })
    }

    fn call<R: DeserializeOwned>(
        &self,
        operation: &str,
        arguments: &impl Serialize,
        limit: Duration,
    ) -> Result<R> {
        let request = self
            .http
            .post(format!("{}/v1/{operation}", self.url))
            .timeout(limit)
            .json(arguments);
        self.runtime.block_on(self.answer(request))
    }

    async fn answer<R: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<R> {
        let answer = request.send().await.map_err(|error| self.lost(&error))?;
        if !answer.status().is_success() {
            return Err(problem_of(answer).await);
        }
        answer.json().await.map_err(|error| self.lost(&error))
    }

    fn many(&self, operation: &str, make: &Make<'_>) -> Vec<Result<Made>> {
        let results: Result<Vec<Result<Made>>> = self.call(operation, make, LIMIT);
        match results {
            Ok(results) if results.len() == make.entries.len() => results,
            Ok(_) => fail(make, &self.unavailable("the response is about other VMs")),
            Err(problem) => fail(make, &problem),
        }
    }

    fn lost(&self, error: &reqwest::Error) -> Problem {
        self.unavailable(&whole(error))
    }

    fn unavailable(&self, why: &str) -> Problem {
        let detail = format!("the host {} does not answer: {why}", self.name);
        Problem::new(ProblemKind::HostUnavailable, detail).retry_after(5)
    }

    async fn open_agent(&self, id: &str) -> Result<UnixStream> {
        let answer = self
            .http
            .get(format!("{}/v1/agent/{id}", self.url))
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, AGENT_PROTOCOL)
            .send()
            .await
            .map_err(|error| self.lost(&error))?;
        if answer.status() != reqwest::StatusCode::SWITCHING_PROTOCOLS {
            return Err(problem_of(answer).await);
        }
        let mut far = answer.upgrade().await.map_err(|error| self.lost(&error))?;
        let local = |error: io::Error| self.unavailable(&error.to_string());
        let (ours, theirs) = UnixStream::pair().map_err(local)?;
        theirs.set_nonblocking(true).map_err(local)?;
        let mut theirs = tokio::net::UnixStream::from_std(theirs).map_err(local)?;
        // Ends when either side does; the other then sees the end of its stream.
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut far, &mut theirs).await });
        Ok(ours)
    }
}

/// A client of the node called `dns`, whatever the network's names say.
pub fn client(dns: &str, address: SocketAddr, tls: ClientConfig) -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .resolve(dns, address)
        .connect_timeout(CONNECT_LIMIT)
        .tcp_keepalive(SILENCE / 3)
        .tcp_user_timeout(SILENCE)
        .http1_only()
        .no_proxy()
        .build()
        .map_err(|error| {
            Problem::new(
                ProblemKind::Internal,
                format!("cannot set up a client: {error}"),
            )
        })
}

fn fail(make: &Make<'_>, problem: &Problem) -> Vec<Result<Made>> {
    make.entries.iter().map(|_| Err(problem.clone())).collect()
}

/// What a refusal says.
pub async fn problem_of(answer: reqwest::Response) -> Problem {
    let status = answer.status();
    match answer.json().await {
        Ok(problem) => problem,
        Err(_) => {
            let detail = format!("the response has status {status} and no problem document");
            Problem::new(ProblemKind::HostUnavailable, detail)
        }
    }
}

/// An error with its causes, without the URL, which says nothing.
pub fn whole(error: &reqwest::Error) -> String {
    let mut source = std::error::Error::source(error);
    let mut text = match source {
        Some(_) => String::new(),
        None => error.to_string(),
    };
    while let Some(cause) = source {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl Host for Remote {
    fn name(&self) -> &str {
        &self.name
    }

    fn address(&self) -> Option<SocketAddr> {
        Some(self.address)
    }

    fn create(&self, template: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        self.many("create", &Make::new(template, entries))
    }

    fn fork_live(&self, id: &str, entries: &[VmSpec]) -> Vec<Result<Made>> {
        self.many("fork", &Make::new(id, entries))
    }

    fn destroy(&self, id: &str, reason: &str) -> Result<()> {
        self.call("destroy", &(id, reason), LIMIT)
    }

    fn pause(&self, id: &str) -> Result<()> {
        self.call("pause", &id, LIMIT)
    }

    fn resume(&self, id: &str) -> Result<()> {
        self.call("resume", &id, LIMIT)
    }

    fn balloon(&self, id: &str, bytes: Option<u64>) -> Result<Balloon> {
        self.call("balloon", &(id, bytes), LIMIT)
    }

    fn snapshot(&self, id: &str, template: &str, diff: bool) -> Result<TemplateFacts> {
        self.call("snapshot", &(id, template, diff), FETCH_LIMIT)
    }

    fn agent(&self, id: &str) -> Result<(Connection, InUse)> {
        let stream = self.runtime.block_on(self.open_agent(id))?;
        let deadline = Deadline::after(GREETING_LIMIT);
        let connection = Connection::greet(stream, deadline).map_err(|error| of_agent(&error))?;
        // The node counts it as used while the connection lives.
        Ok((connection, InUse::elsewhere()))
    }

    fn template(&self, name: &str) -> Result<TemplateFacts> {
        self.call("template", &name, LIMIT)
    }

    fn keep(&self, name: &str, standbys: u32) -> Result<()> {
        self.call("keep", &(name, standbys), LIMIT)
    }

    fn remove_template(&self, name: &str) -> Result<()> {
        self.call("remove-template", &name, LIMIT)
    }

    fn fetch(&self, origin: &Origin) -> Result<()> {
        self.call("fetch", origin, FETCH_LIMIT)
    }

    fn send_template(&self, name: &str, sender: Sender) -> Result<()> {
        self.runtime.block_on(async {
            let url = format!("{}/v1/content/{name}", self.url);
            let answer = self.http.get(url).send().await;
            let answer = answer.map_err(|error| self.lost(&error))?;
            if !answer.status().is_success() {
                return Err(problem_of(answer).await);
            }
            let mut pieces = answer.bytes_stream();
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(|error| io::Error::other(self.lost(&error)));
                if sender.send(piece).await.is_err() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn receive_template(&self, name: &str, pieces: Pieces) -> Result<TemplateFacts> {
        self.runtime.block_on(async {
            let request = self
                .http
                .put(format!("{}/v1/content/{name}", self.url))
                .timeout(FETCH_LIMIT)
                .body(reqwest::Body::wrap_stream(pipe::body_of(pieces)));
            self.answer(request).await
        })
    }

    fn report(&self) -> Result<Report> {
        self.call("report", &(), REPORT_LIMIT)
    }

    fn forget(&self, ids: &[String]) -> Result<()> {
        self.call("forget", &ids, LIMIT)
    }

    fn certificate_request(&self) -> Result<Option<String>> {
        self.call("certificate-request", &(), REPORT_LIMIT)
    }

    fn take_certificate(&self, certificate: &str) -> Result<()> {
        self.call("certificate", &certificate, REPORT_LIMIT)
    }
}

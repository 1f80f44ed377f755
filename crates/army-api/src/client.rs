//! A client of Army's REST API.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use reqwest::redirect::Policy;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Problem;
use crate::events::Event;
use crate::operations::{Operation, Wait};

/// How long a connection is kept for the next request: less than servers keep it.
const POOL_IDLE: Duration = Duration::from_secs(30);

/// The reason that a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server responded with a problem document.
    #[error("{0}")]
    Refused(Problem),
    /// The server cannot be reached, or the connection to it was lost.
    #[error("cannot reach Army at {url}: {cause}")]
    Unreachable {
        /// The URL of the server.
        url: String,
        /// The cause of the failure.
        cause: String,
    },
    /// The response is not one of Army, or of a different version of it.
    #[error("{url} does not answer as Army does: {cause}")]
    Garbled {
        /// The URL of the server.
        url: String,
        /// What is wrong with the response.
        cause: String,
    },
    /// This system has no certificates with which the server's certificate could be verified.
    #[error(
        "cannot check the certificate of {url}: {cause}\n  try: install the system's certificates (the package ca-certificates)"
    )]
    Untrusting {
        /// The URL of the server.
        url: String,
        /// What is missing on this system.
        cause: String,
    },
    /// The CA certificates that the caller passed contain no valid certificate.
    #[error("there is no certificate to check the server with: {cause}")]
    NoCertificate {
        /// What is wrong with the certificates.
        cause: String,
    },
}

/// What became of a request that was not waited for to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begun<T> {
    /// The request has made this.
    Made(T),
    /// The request is in progress.
    InProgress(Box<Operation>),
}

/// A client: the URL of a server, and the key that is sent with each request.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: String,
}

impl Client {
    /// Creates a client of the server at `url`, such as `http://127.0.0.1:7777`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Untrusting`], if `url` begins with `https:` and this system has no
    /// certificates.
    pub fn new(url: impl Into<String>, key: impl Into<String>) -> Result<Self, ClientError> {
        Self::checking(url.into(), key.into(), None)
    }

    /// Creates a client that trusts only servers whose certificate chain ends at a CA certificate
    /// in `pem`.
    ///
    /// # Errors
    ///
    /// [`ClientError::NoCertificate`], if `pem` contains no valid certificate.
    pub fn believing(
        url: impl Into<String>,
        key: impl Into<String>,
        pem: &[u8],
    ) -> Result<Self, ClientError> {
        let unusable = |cause: String| ClientError::NoCertificate { cause };
        let certificates = reqwest::Certificate::from_pem_bundle(pem)
            .map_err(|error| unusable(last_cause(&error)))?;
        if certificates.is_empty() {
            return Err(unusable("there is none".to_owned()));
        }
        Self::checking(url.into(), key.into(), Some(certificates))
    }

    fn checking(
        url: String,
        key: String,
        certificates: Option<Vec<reqwest::Certificate>>,
    ) -> Result<Self, ClientError> {
        // An error means that a provider is already installed, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = url.trim_end_matches('/').to_owned();
        // A redirect would show the key to whomever the answer names.
        let mut http = reqwest::Client::builder()
            .redirect(Policy::none())
            .pool_idle_timeout(POOL_IDLE);
        if let Some(certificates) = certificates {
            http = http.tls_certs_only(certificates);
        } else if !url.starts_with("https:") {
            // Plain HTTP needs no certificates, and a minimal system has none.
            http = http.tls_certs_only([]);
        }
        let http = http.build().map_err(|error| ClientError::Untrusting {
            url: url.clone(),
            cause: last_cause(&error),
        })?;
        Ok(Self { http, url, key })
    }

    /// The URL of the server.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The secret of the key that is sent with each request.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Sends `GET` to `path` with `query`, and parses the response.
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, path).query(query))
            .await
    }

    /// Sends `body` as JSON to `path` with `method`, and parses the response.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.json(self.request(method, path).json(body)).await
    }

    /// Sends `body` with `POST` to create something. Repeating the request with the same
    /// `idempotency_key` does not carry it out again.
    pub async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        idempotency_key: Option<&str>,
    ) -> Result<T, ClientError> {
        let mut request = self.request(Method::POST, path).json(body);
        if let Some(key) = idempotency_key {
            request = request.header("Idempotency-Key", key);
        }
        self.json(request).await
    }

    /// Sends `body` with `POST`, and waits for at most `wait_s` seconds for what it makes.
    pub async fn begin<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        idempotency_key: Option<&str>,
        wait_s: u64,
    ) -> Result<Begun<T>, ClientError> {
        let wait = Wait { wait: Some(wait_s) };
        let mut request = self.request(Method::POST, path).query(&wait).json(body);
        if let Some(key) = idempotency_key {
            request = request.header("Idempotency-Key", key);
        }
        let answer = self.answer(request).await?;
        match answer.status() {
            StatusCode::ACCEPTED => Ok(Begun::InProgress(Box::new(self.parse(answer).await?))),
            _ => Ok(Begun::Made(self.parse(answer).await?)),
        }
    }

    /// Sends `DELETE` to `path`. Returns the operation where the removal has not ended yet.
    pub async fn remove(&self, path: &str) -> Result<Option<Operation>, ClientError> {
        let answer = self.answer(self.request(Method::DELETE, path)).await?;
        match answer.status() {
            StatusCode::ACCEPTED => Ok(Some(self.parse(answer).await?)),
            _ => Ok(None),
        }
    }

    /// Sends a request without a body, and ignores the body of the response.
    pub async fn plain(&self, method: Method, path: &str) -> Result<(), ClientError> {
        self.answer(self.request(method, path)).await.map(drop)
    }

    /// Sends `DELETE` to `path` with `query`, and ignores the body of the response.
    pub async fn delete(&self, path: &str, query: &impl Serialize) -> Result<(), ClientError> {
        let request = self.request(Method::DELETE, path).query(query);
        self.answer(request).await.map(drop)
    }

    /// Sends `body` with `POST` to `path`, and ignores the body of the response.
    pub async fn post(&self, path: &str, body: &impl Serialize) -> Result<(), ClientError> {
        self.answer(self.request(Method::POST, path).json(body))
            .await
            .map(drop)
    }

    /// Downloads the content at `path` as a stream of bytes.
    pub async fn bytes<Q: Serialize>(
        &self,
        path: &str,
        query: &Q,
    ) -> Result<impl Stream<Item = Result<Vec<u8>, ClientError>> + use<Q>, ClientError> {
        self.pieces(self.request(Method::GET, path).query(query))
            .await
    }

    async fn pieces(
        &self,
        request: RequestBuilder,
    ) -> Result<impl Stream<Item = Result<Vec<u8>, ClientError>> + use<>, ClientError> {
        let answer = self.answer(request).await?;
        let client = self.clone();
        let stream = answer.bytes_stream();
        Ok(stream.map(move |piece| {
            piece
                .map(|piece| piece.to_vec())
                .map_err(|error| client.lost(&error))
        }))
    }

    /// Uploads bytes to `path` with `PUT`.
    pub async fn put_bytes(
        &self,
        path: &str,
        query: &impl Serialize,
        body: impl Into<reqwest::Body>,
    ) -> Result<(), ClientError> {
        let request = self.request(Method::PUT, path).query(query).body(body);
        self.answer(request).await.map(drop)
    }

    /// Streams the events after the id `after`, and continues as they happen.
    pub async fn events(
        &self,
        after: Option<i64>,
    ) -> Result<impl Stream<Item = Result<Event, ClientError>> + use<>, ClientError> {
        let filter = crate::events::EventFilter { after };
        self.stream("/v1/events", &filter).await
    }

    /// Streams the server-sent events at `path` with `query`.
    pub async fn stream<T: DeserializeOwned, Q: Serialize>(
        &self,
        path: &str,
        query: &Q,
    ) -> Result<impl Stream<Item = Result<T, ClientError>> + use<T, Q>, ClientError> {
        self.sent_events(self.request(Method::GET, path).query(query))
            .await
    }

    /// Sends `body` with `POST` to `path`, and streams the server-sent events of the response.
    pub async fn post_stream<T: DeserializeOwned, B: Serialize>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<impl Stream<Item = Result<T, ClientError>> + use<T, B>, ClientError> {
        self.sent_events(self.request(Method::POST, path).json(body))
            .await
    }

    async fn sent_events<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
    ) -> Result<impl Stream<Item = Result<T, ClientError>> + use<T>, ClientError> {
        let pieces = self.pieces(request).await?;
        let client = self.clone();
        let lines = Lines {
            pieces: Box::pin(pieces),
            rest: Vec::new(),
        };
        Ok(futures_util::stream::unfold(
            (lines, client),
            |(mut lines, client)| async move {
                loop {
                    let line = match lines.next().await? {
                        Ok(line) => line,
                        Err(error) => return Some((Err(error), (lines, client))),
                    };
                    if let Some(text) = line.strip_prefix("data:") {
                        let event = serde_json::from_str(text.trim_start());
                        let event = event.map_err(|error| client.garbled(&error));
                        return Some((event, (lines, client)));
                    }
                }
            },
        ))
    }

    /// Opens a WebSocket at `path`. The caller chooses the `Sec-WebSocket-Key`; the response is the
    /// `101 Switching Protocols` one, which the caller upgrades.
    ///
    /// # Errors
    ///
    /// Those of any request, and [`ClientError::Garbled`], if the server does not switch protocols.
    pub async fn web_socket(
        &self,
        path: &str,
        query: &impl Serialize,
        key: &str,
    ) -> Result<Response, ClientError> {
        let request = self
            .request(Method::GET, path)
            .query(query)
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", key);
        let answer = self.answer(request).await?;
        match answer.status() {
            StatusCode::SWITCHING_PROTOCOLS => Ok(answer),
            status => Err(self.garbled(&format!("status {status} instead of a WebSocket"))),
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}{path}", self.url);
        self.http.request(method, url).bearer_auth(&self.key)
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let answer = self.answer(request).await?;
        self.parse(answer).await
    }

    async fn parse<T: DeserializeOwned>(&self, answer: Response) -> Result<T, ClientError> {
        let text = answer.bytes().await.map_err(|error| self.lost(&error))?;
        serde_json::from_slice(&text).map_err(|error| self.garbled(&error))
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let answer = request.send().await.map_err(|error| self.lost(&error))?;
        let status = answer.status();
        if status.is_redirection() {
            let target = answer.headers().get(header::LOCATION);
            let target = target.map_or("", |it| it.to_str().unwrap_or_default());
            return Err(self.garbled(&format!("it redirects to `{}`", target.escape_debug())));
        }
        if status < StatusCode::BAD_REQUEST {
            return Ok(answer);
        }
        let text = answer.bytes().await.map_err(|error| self.lost(&error))?;
        match serde_json::from_slice::<Problem>(&text) {
            Ok(problem) => Err(ClientError::Refused(problem)),
            Err(_) => Err(self.garbled(&format!("status {status}"))),
        }
    }

    fn lost(&self, error: &reqwest::Error) -> ClientError {
        ClientError::Unreachable {
            url: self.url.clone(),
            cause: last_cause(error),
        }
    }

    fn garbled(&self, cause: &impl ToString) -> ClientError {
        ClientError::Garbled {
            url: self.url.clone(),
            cause: cause.to_string(),
        }
    }
}

/// Whether requests to `url` show the key to everybody on the way: it is plain HTTP, and not to this
/// host itself.
pub fn exposes_key(url: &str) -> bool {
    let Ok(url) = Url::parse(url) else {
        return false;
    };
    let is_here = url.host_str().is_some_and(|host| {
        let address = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost"
            || address
                .parse()
                .is_ok_and(|address: IpAddr| address.is_loopback())
    });
    url.scheme() == "http" && !is_here
}

/// Encodes a name as one segment of a path, so that no character of it has a special meaning
/// (RFC 3986, sections 2.3 and 3.3). Without this, a request for the name `a?b` would reach `a`.
pub fn segment(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    // Clients and servers resolve `.` and `..` even when they are percent-encoded. Encoded twice,
    // they are names that nothing has.
    if name == "." || name == ".." {
        return name.replace('.', "%252E");
    }
    let mut text = String::with_capacity(name.len());
    for byte in name.bytes() {
        match is_plain(byte) {
            true => text.push(byte.into()),
            false => text += &format!("%{byte:02X}"),
        }
    }
    text
}

/// The last error in the chain of sources, which names the actual cause.
fn last_cause(mut error: &dyn std::error::Error) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Splits a stream of byte chunks into lines.
struct Lines<S> {
    pieces: S,
    rest: Vec<u8>,
}

impl<S: Stream<Item = Result<Vec<u8>, ClientError>> + Unpin> Lines<S> {
    async fn next(&mut self) -> Option<Result<String, ClientError>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                return Some(Ok(line));
            }
            match self.pieces.next().await? {
                Ok(piece) => self.rest.extend(piece),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_one_segment_of_a_path_and_no_other_name() {
        for (name, expected) in [
            ("web-1.x_y~", "web-1.x_y~"),
            ("a/../b", "a%2F..%2Fb"),
            ("a?force=1#x", "a%3Fforce%3D1%23x"),
            ("50% é\n", "50%25%20%C3%A9%0A"),
            ("..", "%252E%252E"),
        ] {
            assert_eq!(segment(name), expected);
            let url = format!("http://h/v1/vms/{}/files", segment(name));
            let url = reqwest::Url::parse(&url).unwrap();
            assert_eq!(url.path_segments().unwrap().count(), 4, "{name}");
            assert!(url.query().is_none() && url.fragment().is_none(), "{name}");
        }
    }

    #[test]
    fn plain_http_beyond_this_host_exposes_the_key() {
        for url in [
            "https://army.example",
            "http://127.0.0.1:7777",
            "http://127.8.9.1",
            "http://[::1]:7777",
            "http://localhost:7777/x",
        ] {
            assert!(!exposes_key(url), "{url}");
        }
        for url in [
            "http://army.example",
            "http://10.0.0.1:7777",
            "http://localhost.example",
            "http://127.0.0.1.example",
            "http://[fe80::1]",
        ] {
            assert!(exposes_key(url), "{url}");
        }
    }

    #[test]
    fn lines_come_whole_however_they_were_cut() {
        let pieces = ["da", "ta: 1\nda", "ta: 2\n\n"].map(|it| Ok(it.as_bytes().to_vec()));
        let mut lines = Lines {
            pieces: futures_util::stream::iter(pieces),
            rest: Vec::new(),
        };
        let mut next = || {
            let next = std::pin::pin!(lines.next());
            match futures_util::FutureExt::now_or_never(next).unwrap() {
                Some(line) => line.unwrap(),
                None => "end".to_owned(),
            }
        };
        assert_eq!(
            [next(), next(), next(), next()],
            ["data: 1", "data: 2", "", "end"]
        );
    }
}

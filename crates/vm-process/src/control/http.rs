//! Parses HTTP/1.1 requests, and writes responses (RFC 9112).
//!
//! The functions are pure, and take bytes that a hostile client may have chosen. A body needs a
//! `Content-Length`; chunked bodies are refused.

use clone_api::{ApiError, ErrorCode};

/// The largest head (request line and headers) that is read.
pub const MAX_HEAD: usize = 8 << 10;
/// The largest body that is read.
pub const MAX_BODY: usize = 64 << 10;
/// The most headers of a request.
const MAX_HEADERS: usize = 48;

/// A request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The method, as the client sent it.
    pub method: &'a str,
    /// The path without a query.
    pub path: &'a str,
    /// The body; empty if the request has none.
    pub body: &'a [u8],
    /// Whether the client wants to keep this connection.
    pub keep_alive: bool,
}

/// The result of parsing the received bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The bytes are an incomplete request.
    Partial,
    /// A request, and its length in bytes.
    Complete(Request<'a>, usize),
    /// The request cannot be served. Since it is unknown where the next one begins, the connection
    /// must be closed after the answer.
    Bad(ApiError),
}

fn bad(message: impl Into<String>) -> Parsed<'static> {
    Parsed::Bad(ApiError::new(ErrorCode::BadRequest, message))
}

fn too_large(what: &str, limit: usize) -> Parsed<'static> {
    Parsed::Bad(ApiError::new(
        ErrorCode::TooLarge,
        format!("the request's {what} is larger than {limit} bytes"),
    ))
}

/// Reads one request from the beginning of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_length = match head.parse(&bytes[..bytes.len().min(MAX_HEAD)]) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD => {
            return too_large("head", MAX_HEAD);
        }
        Ok(httparse::Status::Partial) => return Parsed::Partial,
        Err(httparse::Error::TooManyHeaders) => {
            return bad(format!("the request has more than {MAX_HEADERS} headers"));
        }
        Err(error) => return bad(format!("the request is not HTTP/1.1: {error}")),
    };
    let (Some(method), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return bad("the request has no request line");
    };
    let body_length = match body_length(head.headers) {
        Ok(length) if length > MAX_BODY => return too_large("body", MAX_BODY),
        Ok(length) => length,
        Err(refusal) => return refusal,
    };
    let Some(body) = bytes.get(head_length..head_length + body_length) else {
        return Parsed::Partial;
    };
    let request = Request {
        method,
        path: target.split('?').next().unwrap_or(target),
        body,
        keep_alive: keep_alive(head.headers, version),
    };
    Parsed::Complete(request, head_length + body_length)
}

fn values<'h>(
    headers: &'h [httparse::Header<'h>],
    name: &'static str,
) -> impl Iterator<Item = &'h [u8]> {
    headers
        .iter()
        .filter(move |header| header.name.eq_ignore_ascii_case(name))
        .map(|header| header.value)
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, Parsed<'static>> {
    if values(headers, "transfer-encoding").next().is_some() {
        return Err(bad("send the body with a Content-Length, not chunked"));
    }
    let mut lengths = values(headers, "content-length");
    let Some(length) = lengths.next() else {
        return Ok(0);
    };
    if lengths.next().is_some() {
        return Err(bad("the request has more than one Content-Length"));
    }
    // `parse` alone would also accept a sign.
    let digits = !length.is_empty() && length.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(length).ok().filter(|_| digits);
    match text {
        // A number that overflows `usize` is larger than any limit.
        Some(text) => Ok(text.parse().unwrap_or(usize::MAX)),
        None => Err(bad("the Content-Length is not a number")),
    }
}

fn keep_alive(headers: &[httparse::Header<'_>], version: u8) -> bool {
    let said = |word: &str| {
        values(headers, "connection").any(|value| {
            value
                .split(|&c| c == b',')
                .any(|item| item.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
        })
    };
    match version {
        0 => said("keep-alive"),
        _ => !said("close"),
    }
}

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The JSON body; `None` means an empty body.
    pub body: Option<Vec<u8>>,
    /// The methods that the path allows, for status 405.
    pub allow: Option<String>,
}

impl Response {
    /// Makes the response for `error`.
    pub fn error(error: &ApiError) -> Self {
        Self {
            status: error.code.http_status(),
            // An error consists of two strings and a code, so it always serialises.
            body: Some(serde_json::to_vec(error).unwrap_or_default()),
            allow: None,
        }
    }

    /// Appends the response to `out` in HTTP's format.
    pub fn write(&self, keep_alive: bool, out: &mut Vec<u8>) {
        let body = self.body.as_deref().unwrap_or_default();
        let mut head = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        if self.status != 204 {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        if self.body.is_some() {
            head += "Content-Type: application/json\r\n";
        }
        if let Some(allow) = &self.allow {
            head += &format!("Allow: {allow}\r\n");
        }
        if !keep_alive {
            head += "Connection: close\r\n";
        }
        head += "\r\n";
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(body);
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(bytes: &[u8]) -> Option<ErrorCode> {
        match parse(bytes) {
            Parsed::Bad(error) => Some(error.code),
            _ => None,
        }
    }

    #[test]
    fn a_request_is_read_with_its_body_and_nothing_of_the_next() {
        let bytes =
            b"PUT /v1/vm/balloon?x=1 HTTP/1.1\r\nHost: a\r\ncontent-length: 2\r\n\r\n{}GET /";
        let Parsed::Complete(request, length) = parse(bytes) else {
            panic!("{:?}", parse(bytes));
        };
        assert_eq!((request.method, request.path), ("PUT", "/v1/vm/balloon"));
        assert_eq!(request.body, b"{}");
        assert!(request.keep_alive);
        assert_eq!(&bytes[length..], b"GET /");
    }

    #[test]
    fn every_beginning_of_a_request_is_partial() {
        let bytes = b"PUT /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), Parsed::Partial, "{end}");
        }
    }

    #[test]
    fn connections_end_when_the_client_says_so_or_is_old() {
        for (head, keep) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: foo, Close\r\n\r\n", false),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
        ] {
            match parse(head.as_bytes()) {
                Parsed::Complete(request, _) => assert_eq!(request.keep_alive, keep, "{head}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn bodies_of_doubtful_length_are_refused() {
        let with = |header: &str| format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n").into_bytes();
        for header in [
            "Content-Length: -1",
            "Content-Length: +1",
            "Content-Length: 1 2",
            "Content-Length: 0x1",
            "Content-Length:",
            "Content-Length: 1\r\nContent-Length: 1",
            "Transfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 3",
        ] {
            assert_eq!(code(&with(header)), Some(ErrorCode::BadRequest), "{header}");
        }
        for header in [
            "Content-Length: 65537",
            "Content-Length: 99999999999999999999999",
        ] {
            assert_eq!(code(&with(header)), Some(ErrorCode::TooLarge), "{header}");
        }
    }

    #[test]
    fn heads_without_end_are_refused_at_the_limit() {
        let mut bytes = b"GET / HTTP/1.1\r\nX: ".to_vec();
        bytes.resize(MAX_HEAD - 1, b'x');
        assert_eq!(parse(&bytes), Parsed::Partial);
        bytes.push(b'x');
        assert_eq!(code(&bytes), Some(ErrorCode::TooLarge));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "X: y\r\n".repeat(MAX_HEADERS + 1)
        );
        assert_eq!(code(many.as_bytes()), Some(ErrorCode::BadRequest));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic_or_read_past_their_end(
            bytes in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Parsed::Complete(_, length) = parse(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }

        #[test]
        fn nearly_right_requests_are_read_or_refused(
            method in "[A-Z]{0,9}", target in "[ -~]{0,40}", headers in "([A-Za-z-]{1,20}: [ -~]{0,20}\r\n){0,5}",
            body in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let mut bytes = format!("{method} {target} HTTP/1.1\r\n{headers}\r\n").into_bytes();
            bytes.extend(&body);
            if let Parsed::Complete(_, length) = parse(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}

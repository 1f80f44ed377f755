//! The dashboard: a page that is a client of the API like any other. It asks for a key, and keeps it
//! while its tab is open.

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::get;

use super::App;

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
/// All files, with their paths and types.
const FILES: [(&str, &str, &str); 6] = [
    ("/", HTML, include_str!("dashboard/index.html")),
    (
        "/dashboard.js",
        SCRIPT,
        include_str!("dashboard/dashboard.js"),
    ),
    (
        "/terminal.js",
        SCRIPT,
        include_str!("dashboard/terminal.js"),
    ),
    (
        "/dashboard.css",
        STYLE,
        include_str!("dashboard/dashboard.css"),
    ),
    (
        "/vendor/xterm.mjs",
        SCRIPT,
        include_str!("dashboard/vendor/xterm.mjs"),
    ),
    (
        "/vendor/xterm.css",
        STYLE,
        include_str!("dashboard/vendor/xterm.css"),
    ),
];
/// The content security policy: the page may load only these files, and connect only to this API.
/// Inline styles are permitted because xterm.js creates style sheets.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     connect-src 'self'; img-src 'self' data:; font-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

pub(super) fn router() -> Router<App> {
    FILES
        .iter()
        .fold(Router::new(), |router, (path, kind, text)| {
            let policy = HeaderName::from_static("content-security-policy");
            let answer = ([(header::CONTENT_TYPE, *kind), (policy, POLICY)], *text);
            router.route(path, get(|| async { answer.into_response() }))
        })
}

//! A browser that a test drives: the few commands of W3C WebDriver that the dashboard's test needs,
//! over HTTP to a chromedriver.
//!
//! Source: <https://www.w3.org/TR/webdriver2/>.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::rig::PATIENCE;

/// Names the chromedriver to use, as a URL. Where it is not set, one is started beside the test.
const DRIVER_VARIABLE: &str = "CLONE_TEST_WEBDRIVER";
/// The key under which WebDriver answers with an element (section 11, "web element identifier").
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// How long to wait before an element or a text is looked for again.
const RETRY: Duration = Duration::from_millis(100);

/// A session of Chromium, which ends with this value.
pub(crate) struct Browser {
    http: reqwest::Client,
    /// The URL of the session.
    session: String,
    /// The driver, where it is the test's own.
    _driver: Option<Driver>,
}

/// A chromedriver's process.
struct Driver(Child);

/// An element of the page.
pub(crate) struct Element<'a> {
    browser: &'a Browser,
    id: String,
}

impl Driver {
    /// Starts one, and returns it with its URL.
    fn start() -> (Self, String) {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("chromedriver is missing: `cargo xtask setup` installs it");
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port: u16 = lines
            .find_map(|line| {
                let line = line.unwrap();
                let (_, rest) = line.split_once("successfully on port ")?;
                rest.trim_end_matches('.').parse().ok()
            })
            .unwrap();
        // Its later output is read, so that it never blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        (Self(driver), format!("http://127.0.0.1:{port}"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

impl Browser {
    /// Opens a window.
    pub(crate) async fn start() -> Self {
        let (driver, url) = match std::env::var(DRIVER_VARIABLE) {
            Ok(url) => (None, url),
            Err(_) => {
                let (driver, url) = Driver::start();
                (Some(driver), url)
            }
        };
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--window-size=1200,900",
        ];
        // Its own patience of a minute may not be enough on an emulated processor.
        let patience = PATIENCE.as_millis() as u64;
        let options = json!({"args": arguments, "browserStartupTimeout": patience});
        let wanted = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}});
        // The client wants one, although nothing here is encrypted. A second call does no harm.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut browser = Self {
            http: reqwest::Client::new(),
            session: format!("{url}/session"),
            _driver: driver,
        };
        let session = browser.done(Method::POST, "", &wanted).await;
        browser.session = format!("{url}/session/{}", session["sessionId"].as_str().unwrap());
        browser
    }

    /// Sends a command to `path` below the session: its answer, or WebDriver's error code.
    async fn ask(&self, method: Method, path: &str, body: &Value) -> Result<Value, String> {
        let request = self
            .http
            .request(method.clone(), format!("{}{path}", self.session))
            // A chromedriver serves no other name, by whatever address it is reached.
            .header(reqwest::header::HOST, "localhost");
        let request = match method {
            Method::POST => request.json(body),
            _ => request,
        };
        let answer = request.timeout(PATIENCE).send().await.unwrap();
        let failed = !answer.status().is_success();
        let mut answer: Value = answer.json().await.unwrap();
        match failed {
            true => Err(answer["value"]["error"].to_string()),
            false => Ok(answer["value"].take()),
        }
    }

    /// Sends a command that must succeed.
    async fn done(&self, method: Method, path: &str, body: &Value) -> Value {
        let answer = self.ask(method, path, body).await;
        answer.unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    pub(crate) async fn goto(&self, url: &str) {
        self.done(Method::POST, "/url", &json!({"url": url})).await;
    }

    /// Waits for the first element that `css` selects.
    pub(crate) async fn find(&self, css: &str) -> Element<'_> {
        let wanted = json!({"using": "css selector", "value": css});
        let end = Instant::now() + PATIENCE;
        loop {
            match self.ask(Method::POST, "/element", &wanted).await {
                Ok(found) => {
                    let id = found[ELEMENT].as_str().unwrap().to_owned();
                    return Element { browser: self, id };
                }
                Err(error) => assert!(Instant::now() < end, "{css}: {error}"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    pub(crate) async fn click(&self, css: &str) {
        self.find(css).await.post("click", json!({})).await;
    }

    /// Waits until the text of an element is as it should be, and returns it.
    pub(crate) async fn wait_for(&self, css: &str, is_right: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            // The page may have replaced the element since it was found.
            let text = self.find(css).await.text().await.unwrap_or_default();
            if is_right(&text) {
                return text;
            }
            assert!(Instant::now() < end, "{css} has: {text}");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Closes the window.
    pub(crate) async fn close(&self) {
        self.done(Method::DELETE, "", &Value::Null).await;
    }
}

impl Element<'_> {
    async fn post(&self, command: &str, body: Value) {
        let path = format!("/element/{}/{command}", self.id);
        self.browser.done(Method::POST, &path, &body).await;
    }

    pub(crate) async fn type_in(&self, text: &str) {
        self.post("value", json!({"text": text})).await;
    }

    pub(crate) async fn clear(&self) {
        self.post("clear", json!({})).await;
    }

    async fn text(&self) -> Result<String, String> {
        let path = format!("/element/{}/text", self.id);
        let text = self.browser.ask(Method::GET, &path, &Value::Null).await?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }
}

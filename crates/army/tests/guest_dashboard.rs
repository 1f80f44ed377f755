//! The dashboard in a browser: real clicks in Chromium, real guests behind them.
#![allow(clippy::unwrap_used)]

mod rig;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fantoccini::elements::Element;
use fantoccini::{Client, ClientBuilder, Locator};
use serde_json::json;

use rig::{Host, PATIENCE};

/// Chromium, with its driver.
struct Browser {
    driver: Child,
    client: Client,
}

impl Browser {
    async fn start() -> Self {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("chromedriver is missing: cargo xtask test installs it");
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port: u16 = lines
            .find_map(|line| {
                let line = line.unwrap();
                let (_, rest) = line.split_once("successfully on port ")?;
                rest.trim_end_matches('.').parse().ok()
            })
            .unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        let arguments = json!([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1200,900",
        ]);
        // Where everything is emulated, a minute (what it waits by itself) may not be enough.
        let patience = PATIENCE.as_millis() as u64;
        let options = json!({"args": arguments, "browserStartupTimeout": patience});
        let capabilities = json!({"goog:chromeOptions": options});
        let client = ClientBuilder::new(hyper_util::client::legacy::connect::HttpConnector::new())
            .capabilities(capabilities.as_object().unwrap().clone())
            .connect(&format!("http://127.0.0.1:{port}"))
            .await
            .unwrap();
        Self { driver, client }
    }

    async fn find(&self, css: &str) -> Element {
        let wait = self.client.wait().at_most(PATIENCE);
        let found = wait.for_element(Locator::Css(css)).await;
        found.unwrap_or_else(|error| panic!("{css}: {error}"))
    }

    async fn click(&self, css: &str) {
        self.find(css).await.click().await.unwrap();
    }

    async fn text(&self, css: &str) -> String {
        self.find(css).await.text().await.unwrap()
    }

    /// Waits until the text of an element is as it should be, and tells it.
    async fn wait_for(&self, css: &str, is_right: impl Fn(&str) -> bool) -> String {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            let text = self.text(css).await;
            if is_right(&text) {
                return text;
            }
            assert!(std::time::Instant::now() < end, "{css} has: {text}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill().and_then(|()| self.driver.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_forks_types_and_destroys() {
    // One after the other: both at once take longer than either has patience for.
    let host = Host::new("0815-nonce");
    let browser = Browser::start().await;
    host.army(&["template", "register", "tiny"]);
    browser.client.goto(&host.url).await.unwrap();

    // A wrong key is said to be one.
    browser
        .find("#key")
        .await
        .send_keys("army_wrong")
        .await
        .unwrap();
    browser.click("#login button").await;
    browser
        .wait_for("#status", |text| text.contains("key"))
        .await;
    let key = browser.find("#key").await;
    key.clear().await.unwrap();
    key.send_keys(&host.key).await.unwrap();
    browser.click("#login button").await;

    let told = browser
        .wait_for("#hosts tbody", |text| text.contains("here"))
        .await;
    assert!(told.contains("ready"), "{told}");
    browser.click("[aria-label='Fork tiny']").await;
    let told = browser
        .wait_for("#status", |text| text.contains("running after"))
        .await;
    assert!(told.contains(" ms"), "{told}");
    let vms = host.army(&["vm", "ls"]);
    let name = vms[0]["name"].as_str().unwrap();

    // What is typed comes to a shell in the guest, and its window is the page's.
    browser
        .click(&format!("[aria-label='Terminal in {name}']"))
        .await;
    browser
        .wait_for("#screen .xterm-rows", |text| text.contains('#'))
        .await;
    let input = browser.find("#screen .xterm-helper-textarea").await;
    input
        .send_keys("cat /run/nonce; stty size\n")
        .await
        .unwrap();
    let screen = browser
        .wait_for("#screen .xterm-rows", |text| text.contains("0815-nonce"))
        .await;
    assert!(!screen.contains("\n24 80"), "{screen}");
    browser.click("#hang-up").await;

    browser.click(&format!("[aria-label='Fork {name}']")).await;
    browser
        .wait_for("#status", |text| text.contains("was forked"))
        .await;
    let vms = host.army(&["vm", "ls"]);
    assert_eq!(vms.as_array().unwrap().len(), 2, "{vms}");
    for vm in vms.as_array().unwrap() {
        let name = vm["name"].as_str().unwrap();
        browser
            .click(&format!("[aria-label='Destroy {name}']"))
            .await;
        let gone = format!("{name} is gone");
        browser.wait_for("#status", |text| text == gone).await;
    }
    assert_eq!(browser.text("#vms tbody").await, "");
    assert_eq!(host.there(), [""; 0]);
    // The key leaves the page.
    browser.click("#leave").await;
    browser.find("#login:not([hidden])").await;
    browser.client.clone().close().await.unwrap();
}

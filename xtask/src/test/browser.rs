//! The dashboard's browser, outside of the testbed: Chromium on an emulated processor takes minutes
//! for what takes seconds here, and it needs only one port of the Army inside.
//!
//! The testbed gets a network card of its own for this. A port of this machine leads to the Army in
//! it, and an address that only the testbed sees leads to the chromedriver here.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::testbed::{INSIDE_ADDRESS, OUTSIDE_ADDRESS, Size};

/// The port of the Army inside.
const ARMY_PORT: u16 = 7777;

/// A chromedriver, which ends with this value.
pub(super) struct OutsideBrowser {
    driver: Child,
    driver_port: u16,
    page_port: u16,
}

impl OutsideBrowser {
    pub(super) fn start() -> Result<Self> {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start chromedriver")?;
        let output = driver.stdout.take().context("its output is a pipe")?;
        let mut lines = BufReader::new(output).lines();
        let port = lines.find_map(|line| {
            let line = line.ok()?;
            let (_, rest) = line.split_once("successfully on port ")?;
            rest.trim_end_matches('.').parse().ok()
        });
        // Its later output is read, so that it never blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let mut browser = Self {
            driver,
            driver_port: 0,
            page_port: free_port()?,
        };
        browser.driver_port = port.context("chromedriver does not say its port")?;
        Ok(browser)
    }

    /// The testbed that it needs.
    pub(super) fn size(&self) -> Size {
        Size {
            forward: Some((self.page_port, ARMY_PORT)),
            ..Size::default()
        }
    }

    /// A command's beginning that tells tests where the browser is and where it finds them.
    pub(super) fn environment(&self) -> Vec<OsString> {
        vec![
            "env".into(),
            format!(
                "CLONE_TEST_WEBDRIVER=http://{OUTSIDE_ADDRESS}:{}",
                self.driver_port
            )
            .into(),
            format!("CLONE_TEST_PAGE=http://127.0.0.1:{}", self.page_port).into(),
            format!("CLONE_TEST_LISTEN={INSIDE_ADDRESS}:{ARMY_PORT}").into(),
        ]
    }
}

impl Drop for OutsideBrowser {
    fn drop(&mut self) {
        let _ = self.driver.kill().and_then(|()| self.driver.wait());
    }
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
    Ok(listener.local_addr()?.port())
}

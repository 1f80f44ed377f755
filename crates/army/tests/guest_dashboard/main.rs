//! The dashboard in a browser: real clicks in Chromium, real guests behind them.
#![allow(clippy::unwrap_used)]

mod browser;
#[path = "../rig/mod.rs"]
mod rig;

use browser::Browser;
use rig::Host;

/// The address under which the browser reaches the server, where that is not the server's own: in
/// the testbed the browser runs outside, and a port of the machine outside leads in.
const PAGE_VARIABLE: &str = "CLONE_TEST_PAGE";

#[tokio::test(flavor = "multi_thread")]
async fn a_person_forks_types_and_destroys() {
    // One after the other: both at once take longer than either has patience for.
    let host = Host::new("0815-nonce");
    let browser = Browser::start().await;
    host.army(&["template", "register", "tiny"]);
    let page = std::env::var(PAGE_VARIABLE).unwrap_or_else(|_| host.url.clone());
    browser.goto(&page).await;

    // A wrong key is said to be one.
    browser.find("#key").await.type_in("army_wrong").await;
    browser.click("#login button").await;
    browser
        .wait_for("#status", |text| text.contains("key"))
        .await;
    let key = browser.find("#key").await;
    key.clear().await;
    key.type_in(&host.key).await;
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
    input.type_in("cat /run/nonce; stty size\n").await;
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
    browser.wait_for("#vms tbody", str::is_empty).await;
    assert_eq!(host.there(), [""; 0]);
    // The key leaves the page.
    browser.click("#leave").await;
    browser.find("#login:not([hidden])").await;
    browser.close().await;
}

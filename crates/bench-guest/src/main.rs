//! The part of the benchmarks that runs in a guest: measures a block device or a TCP connection,
//! and prints one number a line; or makes a guest's ticks or its load, until it is ended. Copied into the guest by the measuring program, which knows what
//! the numbers mean; alike in every VMM that is compared.
// Its output is its purpose.
#![allow(clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod block;
mod memory;
mod net;

use std::process::ExitCode;

const USAGE: &str = "usage: bench-guest block-latency read|write DEVICE COUNT | \
                     block-throughput read|write DEVICE MIB | \
                     net-send ADDRESS MIB | net-ping ADDRESS COUNT | \
                     net-tick ADDRESS MICROSECONDS | write MIB MIB_A_SECOND";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(figures) => {
            for figure in figures {
                println!("{figure}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bench-guest {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> std::io::Result<Vec<u64>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| std::io::Error::other(format!("{text} is not a number")))
    };
    match words[..] {
        ["block-latency", way, device, count] => block::latency(way, device, number(count)?),
        ["block-throughput", way, device, mib] => block::throughput(way, device, number(mib)?),
        ["net-send", address, mib] => net::send(address, number(mib)?),
        ["net-ping", address, count] => net::ping(address, number(count)?),
        ["net-tick", address, microseconds] => net::tick(address, number(microseconds)?),
        ["write", mib, rate] => memory::write(number(mib)?, number(rate)?),
        _ => Err(std::io::Error::other(USAGE)),
    }
}

//! Messages there and back over a number of connections, as fast as they come or at a fixed rate. Takes the server,
//! how many, how large and how often; gives the distribution of times. At a fixed rate, time counts from when a message
//! was due, not from when the one before it came back: a stall costs all that it delays.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, default_value_t = 1)]
    connections: u32,
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// Messages a second over all connections; as fast as they come without.
    #[arg(long)]
    rate: Option<f64>,
    #[arg(long)]
    seconds: f64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut streams = Vec::new();
    for _ in 0..args.connections {
        let mut stream = super::dial(args.to).with_context(|| format!("connect to {}", args.to))?;
        let mut message = vec![b'x'; args.bytes];
        exchange(&mut stream, &mut message)?;
        streams.push(stream);
    }
    let interval = args
        .rate
        .map(|rate| Duration::from_secs_f64(f64::from(args.connections) / rate));
    let gate = Barrier::new(streams.len() + 1);
    let mut times = Vec::new();
    let mut failed = 0_u64;
    thread::scope(|scope| {
        let workers: Vec<_> = streams
            .into_iter()
            .zip(0_u32..)
            .map(|(stream, number)| {
                let phase = interval
                    .map(|interval| interval * number / args.connections.max(1))
                    .unwrap_or_default();
                let gate = &gate;
                scope.spawn(move || work(stream, args, interval, phase, gate))
            })
            .collect();
        gate.wait();
        for worker in workers {
            match worker.join() {
                Ok(Ok(worker_times)) => times.extend(worker_times),
                Ok(Err(_)) | Err(_) => failed += 1,
            }
        }
    });
    ensure!(failed == 0, "{failed} connections broke");
    times.sort_unstable();
    super::say(&json!({
        "count": times.len(),
        "seconds": args.seconds,
        "p50_us": super::quantile(&times, 500),
        "p90_us": super::quantile(&times, 900),
        "p99_us": super::quantile(&times, 990),
        "p999_us": super::quantile(&times, 999),
        "max_us": times.last().copied().map(super::micros),
    }))
}

fn work(
    mut stream: TcpStream,
    args: &Args,
    interval: Option<Duration>,
    phase: Duration,
    gate: &Barrier,
) -> Result<Vec<Duration>> {
    let mut message = vec![b'x'; args.bytes];
    let mut times = Vec::new();
    gate.wait();
    let began = Instant::now();
    let until = began + Duration::from_secs_f64(args.seconds);
    let mut due = began + phase;
    while Instant::now() < until {
        let mut from = Instant::now();
        if let Some(interval) = interval {
            if from < due {
                // Waking late is our own fault, not that of the path.
                thread::sleep(due - from);
                from = Instant::now();
            } else {
                from = due;
            }
            due += interval;
        }
        exchange(&mut stream, &mut message)?;
        times.push(from.elapsed());
    }
    Ok(times)
}

fn exchange(stream: &mut TcpStream, message: &mut [u8]) -> Result<()> {
    stream.write_all(message)?;
    Ok(stream.read_exact(message)?)
}

//! One turn: a load on one contender's world, with its cost and the proof by the counters on the cables. Takes a world
//! and a scenario; gives numbers in the order of the scenario's metrics, or says why there are none.

use std::{
    env,
    io::{Read as _, Write as _},
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use ztunnel_tests::{
    apps,
    netns::Netns,
    process::{Running, finish},
};

use crate::{
    contenders::{Contender, ECHO, HOLD, HTTP, IPERF, Place, SOCKPERF},
    machine::Spent,
    scenario::{Load, Scenario},
    stats,
    world::{Claim, World},
};

/// How hard and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) seconds: u32,
    /// Messages per second that every contender of [`Load::Steady`] gets.
    pub(crate) steady_rate: f64,
}

/// What a turn gave.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) values: Vec<f64>,
    /// Who else used the machine meanwhile.
    pub(crate) disturber: Option<String>,
}

/// Does it once.
pub(crate) fn turn(world: &mut World, scenario: &Scenario, effort: Effort) -> Result<Turn> {
    if scenario.load == Load::Cold && world.contender != Contender::None {
        world.restart()?;
    }
    let world = &*world;
    if scenario.load != Load::Cold {
        warm_up(world, scenario.place)?;
    }
    world.forget_logs()?;
    let usage = world.usage()?;
    let counts = world.counts()?;
    let done = work(world, scenario, effort)?;
    let counts = world.counts()?.since(counts);
    let spent = usage.until(&world.usage()?);
    Claim::of(world.contender, scenario.place).check_counts(scenario.place, counts)?;
    Ok(Turn {
        values: values(&done, scenario, &spent),
        disturber: spent.disturber,
    })
}

/// What 64 connections of this world carry when each message follows the last.
pub(crate) fn capacity(world: &World, place: Place) -> Result<f64> {
    let to = world.target(place, ECHO)?.to_string();
    let answer = own(
        world.client()?,
        &[
            "pingpong",
            "--to",
            &to,
            "--connections",
            STEADY_CONNECTIONS,
            "--seconds",
            "0.7",
        ],
    )?;
    Ok(number(&answer, "/count")? / number(&answer, "/seconds")?)
}

/// What a load gave: its own numbers, and by how many units its cost is to be divided.
struct Done {
    values: Vec<f64>,
    units: f64,
    /// Of a second: CPU per unit is told in these.
    fraction: f64,
}

fn work(world: &World, scenario: &Scenario, effort: Effort) -> Result<Done> {
    let client = world.client()?;
    let target = |port| world.target(scenario.place, port);
    match scenario.load {
        Load::Bulk(streams) => bulk(client, target(IPERF)?, streams, effort.seconds),
        Load::PingPong => ping_pong(client, target(SOCKPERF)?, effort.seconds),
        Load::Requests(connections) => requests(client, target(HTTP)?, connections, effort.seconds),
        Load::Steady => steady(client, target(ECHO)?, effort),
        Load::Connects => connects(client, target(ECHO)?, effort.seconds),
        Load::Cold => cold(world, target(ECHO)?),
        Load::Unread => unread(client, target(HOLD)?, target(ECHO)?, effort.seconds),
    }
}

fn values(done: &Done, scenario: &Scenario, spent: &Spent) -> Vec<f64> {
    let per_unit = |seconds: f64| seconds / done.units / done.fraction;
    let mut values = done.values.clone();
    values.push(per_unit(spent.machine_seconds));
    values.push(per_unit(spent.processes_seconds));
    values.truncate(scenario.metrics.len());
    values
}

fn warm_up(world: &World, place: Place) -> Result<()> {
    let mut stream = apps::dial(world.client()?, world.target(place, ECHO)?)?;
    stream.write_all(b"warm")?;
    Ok(stream.read_exact(&mut [0; 4])?)
}

fn bulk(client: &Netns, to: SocketAddr, streams: u32, seconds: u32) -> Result<Done> {
    let mut iperf = Command::new("iperf3");
    iperf.args(["--json", "--client", &to.ip().to_string()]);
    iperf.args(["--port", &to.port().to_string()]);
    iperf.args(["--time", &seconds.to_string()]);
    iperf.args(["--parallel", &streams.to_string()]);
    let answer: Value = serde_json::from_str(&finish(Some(client), &mut iperf)?)?;
    let received = "/end/sum_received";
    let gigabits = number(&answer, &format!("{received}/bits_per_second"))? / 1e9;
    Ok(Done {
        values: vec![gigabits],
        units: number(&answer, &format!("{received}/bytes"))?,
        fraction: 1e-9,
    })
}

fn ping_pong(client: &Netns, to: SocketAddr, seconds: u32) -> Result<Done> {
    let mut sockperf = Command::new("sockperf");
    sockperf.args(["ping-pong", "--tcp", "--full-rtt"]);
    sockperf.args(["--ip", &to.ip().to_string()]);
    sockperf.args(["--port", &to.port().to_string()]);
    sockperf.args(["--msg-size", "1024", "--time", &seconds.to_string()]);
    let said = finish(Some(client), &mut sockperf)?;
    let percentile = |which: &str| -> Result<f64> {
        said.lines()
            .find(|line| line.contains(&format!("percentile {which}")))
            .and_then(|line| line.rsplit('=').next()?.trim().parse().ok())
            .with_context(|| format!("sockperf tells no percentile {which}:\n{said}"))
    };
    Ok(Done {
        values: vec![percentile("50.000")?, percentile("99.000")?],
        units: f64::NAN,
        fraction: 1e-6,
    })
}

fn requests(client: &Netns, to: SocketAddr, connections: u32, seconds: u32) -> Result<Done> {
    let mut wrk = Command::new("wrk");
    wrk.args(["--threads", "2", "--latency"]);
    wrk.args(["--connections", &connections.to_string()]);
    wrk.args(["--duration", &format!("{seconds}s")]);
    wrk.arg(format!("http://{to}/"));
    let said = finish(Some(client), &mut wrk)?;
    ensure!(
        !said.contains("Socket errors") && !said.contains("Non-2xx"),
        "not every request was answered:\n{said}"
    );
    let after = |label: &str| {
        said.lines()
            .find_map(|line| line.trim().strip_prefix(label))
            .map(str::trim)
            .with_context(|| format!("wrk tells no {label}:\n{said}"))
    };
    let total = said
        .lines()
        .find(|line| line.contains(" requests in "))
        .and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
        .with_context(|| format!("wrk tells no total:\n{said}"))?;
    Ok(Done {
        values: vec![
            after("Requests/sec:")?.parse()?,
            milliseconds(after("99%")?)?,
        ],
        units: total,
        fraction: 1e-6,
    })
}

fn steady(client: &Netns, to: SocketAddr, effort: Effort) -> Result<Done> {
    let (to, rate, seconds) = (
        to.to_string(),
        effort.steady_rate.to_string(),
        effort.seconds.to_string(),
    );
    let answer = own(
        client,
        &[
            "pingpong",
            "--to",
            &to,
            "--connections",
            STEADY_CONNECTIONS,
            "--rate",
            &rate,
            "--seconds",
            &seconds,
        ],
    )?;
    Ok(Done {
        values: vec![number(&answer, "/p50_us")?, number(&answer, "/p99_us")?],
        units: number(&answer, "/count")?,
        fraction: 1e-6,
    })
}

fn connects(client: &Netns, to: SocketAddr, seconds: u32) -> Result<Done> {
    let (to, seconds) = (to.to_string(), seconds.to_string());
    let answer = own(client, &["connect", "--to", &to, "--seconds", &seconds])?;
    let (count, errors) = (number(&answer, "/count")?, number(&answer, "/errors")?);
    ensure!(
        errors * 1000.0 < count,
        "{errors} connections failed beside {count}"
    );
    Ok(Done {
        values: vec![count / number(&answer, "/seconds")?],
        units: count,
        fraction: 1e-6,
    })
}

/// One connection from each of some pods, none of which has had one.
fn cold(world: &World, to: SocketAddr) -> Result<Done> {
    let mut times = Vec::new();
    for number in 0..COLD_CLIENTS {
        let took = world.cold_client(number)?.within(|| {
            let began = Instant::now();
            let mut stream = std::net::TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(began.elapsed())
        })?;
        times.push(took.as_secs_f64() * 1e6);
    }
    Ok(Done {
        values: stats::median(&mut times).into_iter().collect(),
        units: f64::NAN,
        fraction: 1e-6,
    })
}

fn unread(client: &Netns, hold: SocketAddr, echo: SocketAddr, seconds: u32) -> Result<Done> {
    let p99 = || {
        let (to, seconds) = (echo.to_string(), seconds.to_string());
        let answer = own(client, &["pingpong", "--to", &to, "--seconds", &seconds])?;
        number(&answer, "/p99_us")
    };
    let alone = p99()?;
    let mut command = Command::new(env::current_exe()?);
    command.args(["role", "unread", "--to", &hold.to_string()]);
    let bulk = Running::start("the unread stream", Some(client), command)?;
    bulk.log().wait_for("stuck", PATIENCE, |line| {
        line.contains("stuck_after_bytes").then_some(())
    })?;
    let beside = p99()?;
    drop(bulk);
    Ok(Done {
        values: vec![beside / alone, beside],
        units: f64::NAN,
        fraction: 1e-6,
    })
}

/// Plays one of our own roles to its end, and reads its line.
fn own(netns: &Netns, args: &[&str]) -> Result<Value> {
    let mut command = Command::new(env::current_exe()?);
    command.arg("role").args(args);
    let said = finish(Some(netns), &mut command)?;
    serde_json::from_str(&said).with_context(|| said.clone())
}

fn number(answer: &Value, pointer: &str) -> Result<f64> {
    answer
        .pointer(pointer)
        .and_then(Value::as_f64)
        .with_context(|| format!("no {pointer} in {answer}"))
}

/// `1.25ms`, `830.00us`, `1.02s`.
fn milliseconds(text: &str) -> Result<f64> {
    for (unit, per_millisecond) in [("us", 1e3), ("ms", 1.0), ("s", 1e-3)] {
        if let Some(value) = text.strip_suffix(unit)
            && let Ok(value) = value.parse::<f64>()
        {
            return Ok(value / per_millisecond);
        }
    }
    anyhow::bail!("not a time: {text}")
}

const STEADY_CONNECTIONS: &str = "64";
const COLD_CLIENTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_wrk_writes_them() {
        assert_eq!(milliseconds("1.25ms").unwrap(), 1.25);
        assert_eq!(milliseconds("830.00us").unwrap(), 0.83);
        assert_eq!(milliseconds("1.02s").unwrap(), 1020.0);
        milliseconds("fast").unwrap_err();
    }
}

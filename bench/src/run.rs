//! A whole run: a world per contender, every scenario with its proofs, repetitions in which the contenders take turns,
//! then the table. Takes the command line; gives whether every proof held.

use std::{fs, time::Duration, time::Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    contenders::{Contender, Setting},
    load::{self, Effort},
    machine,
    memory::{self, Crowd},
    options::Run,
    plot,
    progress::{self, Cleaner, Progress},
    report::{self, Samples},
    scenario::{self, Load, MEMORY, SCENARIOS, Scenario},
    world::{CONGESTION_CONTROL, World},
};

pub(crate) fn run(args: &Run) -> Result<bool> {
    let contenders = args.contenders()?;
    let (repetitions, seconds) = (args.repetitions()?, args.seconds()?);
    let cleaner = Cleaner::begin()?;
    let began = Instant::now();
    let setting = args.with.setting();
    let about = about(args, &setting, &contenders)?;
    println!("{}", describe(&about, args.quick));

    let scenarios: Vec<&Scenario> = SCENARIOS
        .iter()
        .filter(|scenario| scenario.is_wanted(&args.only))
        .filter(|scenario| scenario.quick || !args.quick || !args.only.is_empty())
        .collect();
    let turns: usize = scenarios
        .iter()
        .map(|scenario| contenders.iter().filter(|c| scenario.admits(**c)).count())
        .sum();
    let mut bench = Bench {
        args,
        repetitions,
        effort: Effort {
            seconds,
            steady_rate: 0.0,
        },
        worlds: Vec::new(),
        samples: Samples::default(),
        progress: Progress::of(u32::try_from(turns * repetitions)?),
    };
    bench.wait_quiet()?;
    for contender in &contenders {
        bench.progress.line(&format!("starting {contender}"));
        bench.worlds.push(World::build(*contender, &setting)?);
    }
    for scenario in &scenarios {
        bench.scenario(scenario)?;
    }
    if scenario::wanted(MEMORY, &args.only) {
        bench.memory()?;
    }
    let Bench {
        worlds,
        samples,
        progress,
        ..
    } = bench;
    drop(worlds);
    cleaner.finish()?;

    let rows = samples.rows();
    progress.note("");
    println!("{}", report::table(&rows, samples.failures())?);
    println!("{}", describe(&about, args.quick));
    println!("took {:.0} s", began.elapsed().as_secs_f32());
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&report::json(&rows, &about))?;
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(directory) = &args.plot {
        for file in plot::all(&rows, &about, directory)? {
            println!("wrote {}", file.display());
        }
    }
    Ok(samples.failures().is_empty())
}

struct Bench<'a> {
    args: &'a Run,
    repetitions: usize,
    effort: Effort,
    worlds: Vec<World>,
    samples: Samples,
    progress: Progress,
}

impl Bench<'_> {
    fn wait_quiet(&mut self) -> Result<()> {
        if self.args.noisy {
            return Ok(());
        }
        machine::wait_quiet(PATIENCE, |why| self.progress.line(why))
    }

    fn scenario(&mut self, scenario: &'static Scenario) -> Result<()> {
        let id = scenario
            .metrics
            .first()
            .map_or("", |metric| metric.scenario);
        let mut able = Vec::new();
        for at in 0..self.worlds.len() {
            let Some(world) = self.worlds.get(at) else {
                continue;
            };
            let contender = world.contender;
            if !scenario.admits(contender) {
                continue;
            }
            self.progress.line(&format!("{id} proof · {contender}"));
            match world.prove(scenario.place) {
                Ok(evidence) => {
                    able.push(at);
                    self.progress
                        .line(&format!("{id} proof · {contender}: {evidence}"));
                }
                Err(error) => self.fail(scenario, contender, &error),
            }
        }
        if scenario.load == Load::Steady {
            self.effort.steady_rate = self.steady_rate(&mut able, scenario);
        }
        for repetition in 0..self.repetitions {
            // Nobody is always the one after a heavy neighbour.
            let shift = repetition % able.len().max(1);
            able.rotate_left(shift);
            let mut broken = Vec::new();
            for at in &able {
                if let Some(failed) = self.turn(scenario, *at, repetition)? {
                    broken.push(failed);
                }
            }
            able.rotate_right(shift);
            able.retain(|at| !broken.contains(at));
        }
        Ok(())
    }

    /// One measurement; gives the world's number if it failed for good.
    fn turn(
        &mut self,
        scenario: &'static Scenario,
        at: usize,
        repetition: usize,
    ) -> Result<Option<usize>> {
        let id = scenario
            .metrics
            .first()
            .map_or("", |metric| metric.scenario);
        let Some(world) = self.worlds.get_mut(at) else {
            return Ok(None);
        };
        let contender = world.contender;
        self.progress.step(&format!(
            "{id} {} · {contender}, {} of {}",
            scenario.title,
            repetition + 1,
            self.repetitions
        ));
        let mut values = None;
        for _ in 0..TRIES {
            match load::turn(world, scenario, self.effort) {
                Ok(turn) if turn.disturber.is_none() || self.args.noisy => {
                    values = Some(turn.values);
                    break;
                }
                Ok(turn) => {
                    let disturber = turn.disturber.unwrap_or_default();
                    self.progress.line(&format!("again: {disturber}"));
                    // If it does not become quiet, the next try says so, or the repetition is left out.
                    drop(machine::wait_quiet(PATIENCE, |why| self.progress.line(why)));
                }
                Err(error) => {
                    self.fail(scenario, contender, &error);
                    return Ok(Some(at));
                }
            }
        }
        if repetition > 0 {
            self.samples
                .add(scenario.metrics, contender, values.as_deref());
        }
        Ok(None)
    }

    /// Half of what the slowest can: everybody gets the same, and nobody is saturated.
    fn steady_rate(&mut self, able: &mut Vec<usize>, scenario: &'static Scenario) -> f64 {
        let mut slowest = f64::MAX;
        let mut broken = Vec::new();
        for at in able.iter() {
            let Some(world) = self.worlds.get(*at) else {
                continue;
            };
            match load::capacity(world, scenario.place) {
                Ok(capacity) => slowest = slowest.min(capacity),
                Err(error) => {
                    let contender = world.contender;
                    broken.push(*at);
                    self.fail(scenario, contender, &error);
                }
            }
        }
        able.retain(|at| !broken.contains(at));
        let rate = (slowest / 2.0).clamp(100.0, 1e6);
        self.progress
            .note(&format!("S5: everybody gets {rate:.0} messages a second"));
        rate
    }

    fn memory(&mut self) -> Result<()> {
        let (mut crowd, repetitions) = if self.args.quick {
            (QUICK_CROWD, 1)
        } else {
            (CROWD, self.repetitions.saturating_sub(1).clamp(1, 3))
        };
        // A proxy has a descriptor for each side of a connection, and some for itself.
        let most = progress::descriptors()?.saturating_sub(SPARE_DESCRIPTORS) / 2;
        crowd.connections = crowd
            .connections
            .min(u32::try_from(most).unwrap_or(u32::MAX));
        let mut worlds = std::mem::take(&mut self.worlds);
        worlds.retain(|world| {
            !matches!(
                world.contender,
                Contender::None | Contender::Limit | Contender::OursCrypto
            )
        });
        let mut failed: Vec<Contender> = Vec::new();
        for _ in 0..repetitions {
            let progress = &mut self.progress;
            let measured = memory::measure(&mut worlds, crowd, |what| {
                progress.line(&format!("S9 {what}"));
            });
            for (contender, values) in measured {
                match values {
                    _ if failed.contains(&contender) => {}
                    Ok(values) => self.samples.add(MEMORY, contender, Some(&values)),
                    Err(error) => {
                        failed.push(contender);
                        self.samples.fail(
                            MEMORY,
                            "idle connections",
                            contender,
                            format!("{error:#}"),
                        );
                    }
                }
            }
        }
        self.worlds = worlds;
        Ok(())
    }

    fn fail(&mut self, scenario: &'static Scenario, contender: Contender, error: &anyhow::Error) {
        let why = format!("{error:#}");
        self.progress.note(&format!(
            "{}: {contender} gives no number: {why}",
            scenario.title
        ));
        self.samples
            .fail(scenario.metrics, scenario.title, contender, why);
    }
}

/// Box, versions and settings: part of every output.
fn about(args: &Run, setting: &Setting, contenders: &[Contender]) -> Result<Value> {
    let version = |program: &std::path::Path, argument: &str| {
        let said = machine::first_line(&program.to_string_lossy(), &[argument]);
        // Envoy begins with its own path.
        said.split_once("version: ")
            .map_or_else(|| said.clone(), |(_, version)| version.to_owned())
    };
    let mut versions = json!({});
    for contender in contenders {
        let said = match contender {
            Contender::Ours => version(&setting.ztunnel, "version"),
            Contender::Envoy => version(&setting.envoy, "--version"),
            Contender::Peer => setting
                .peer
                .as_ref()
                .map_or_else(String::new, |peer| version(peer, "version")),
            Contender::None | Contender::OursCrypto | Contender::Limit => continue,
        };
        if let Some(versions) = versions.as_object_mut() {
            versions.insert(contender.name().to_owned(), said.into());
        }
    }
    Ok(json!({
        "machine": machine::facts(),
        "versions": versions,
        "workers": setting.workers,
        "access_log": setting.access_log,
        "congestion_control": CONGESTION_CONTROL,
        "repetitions": args.repetitions()? - 1,
        "seconds": args.seconds()?,
        "quick": args.quick,
        "noisy": args.noisy,
    }))
}

/// The same for a person.
pub(crate) fn describe(about: &Value, quick: bool) -> String {
    let text = |pointer: &str| {
        let value = about.pointer(pointer).cloned().unwrap_or_default();
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    format!(
        "{}{}, {} CPUs for clients, proxies and servers together; kernel {}; {}; {} worker threads per proxy; access log {}; {} repetitions of {} s after the first; {}",
        if quick {
            "QUICK RUN, for orientation only. "
        } else {
            ""
        },
        text("/machine/cpu"),
        text("/machine/cpus"),
        text("/machine/kernel"),
        text("/congestion_control"),
        text("/workers"),
        if about.get("access_log") == Some(&Value::Bool(true)) {
            "on"
        } else {
            "off"
        },
        text("/repetitions"),
        text("/seconds"),
        text("/versions"),
    )
}

/// Measurements of one turn before it stays a hole.
const TRIES: u32 = 3;
const PATIENCE: Duration = Duration::from_secs(60);
const CROWD: Crowd = Crowd {
    connections: 10_000,
    rest: Duration::from_secs(60),
};
const SPARE_DESCRIPTORS: u64 = 1_000;
const QUICK_CROWD: Crowd = Crowd {
    connections: 2_000,
    rest: Duration::from_secs(3),
};

//! Certificates asked for once, kept, renewed and forgotten, on a paused clock.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::Semaphore;
use tokio::time::advance;

use super::super::ca::Issued;
use super::super::testing::{Authority, id, paused_clock};
use super::super::{RevocationLists, Revocations};
use super::*;

const TTL: Duration = Duration::from_secs(3600);

/// Signs while it may; without a permit it hangs, in bad weather it fails.
struct Fake {
    authority: Authority,
    open: Semaphore,
    bad: AtomicU32,
    started: std::sync::mpsc::Sender<SpiffeId>,
}

impl Issuer for Arc<Fake> {
    async fn issue(&self, id: &SpiffeId, now: SystemTime, ttl: Duration) -> Result<Issued, Error> {
        self.started.send(id.clone()).unwrap();
        drop(self.open.acquire().await.unwrap());
        if self.bad.load(Ordering::Relaxed) > 0 {
            return Err(Error::Malformed { id: id.clone() });
        }
        self.authority.issue(id, now, ttl).await
    }
}

struct Bench {
    store: Arc<Store>,
    fake: Arc<Fake>,
    started: std::sync::mpsc::Receiver<SpiffeId>,
    run: tokio::task::JoinHandle<()>,
}

fn bench(permits: usize, params: Params) -> Bench {
    let (tx, started) = std::sync::mpsc::channel();
    let fake = Arc::new(Fake {
        authority: Authority::new(),
        open: Semaphore::new(permits),
        bad: AtomicU32::new(0),
        started: tx,
    });
    let store = Arc::new(Store::new(params, paused_clock()));
    let (running, issuer) = (Arc::clone(&store), Arc::clone(&fake));
    let run = tokio::spawn(async move { running.run(&issuer).await });
    Bench {
        store,
        fake,
        started,
        run,
    }
}

fn params() -> Params {
    Params {
        ttl: TTL,
        ..Params::default()
    }
}

impl Bench {
    fn asked(&self) -> usize {
        self.started.try_iter().count()
    }

    fn weather(&self, bad: bool) {
        self.fake.bad.store(u32::from(bad), Ordering::Relaxed);
    }
}

/// Lets every task run until it waits.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_for_one_identity_asks_once_and_shares_the_answer() {
    let bench = bench(0, params());
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let store = Arc::clone(&bench.store);
            tokio::spawn(async move { store.get(&id("cart")).await.unwrap() })
        })
        .collect();
    settle().await;
    bench.fake.open.add_permits(1);
    let mut got = Vec::new();
    for waiter in waiters {
        got.push(waiter.await.unwrap());
    }
    assert!(got.iter().all(|c| Arc::ptr_eq(c, &got[0])));
    assert_eq!(bench.asked(), 1);
}

/// Behaviour 156, first half: whoever asks after a renewal gets the new certificate.
#[tokio::test(start_paused = true)]
async fn renews_in_the_background_after_half_of_the_life() {
    let bench = bench(1, params());
    let first = bench.store.get(&id("cart")).await.unwrap();
    advance(TTL / 2 - Duration::from_secs(1)).await;
    settle().await;
    assert!(Arc::ptr_eq(
        &first,
        &bench.store.get(&id("cart")).await.unwrap()
    ));
    assert_eq!(bench.asked(), 1);
    advance(TTL.mul_f64(RENEWAL_JITTER) + Duration::from_secs(2)).await;
    settle().await;
    assert_eq!(bench.asked(), 1);
    let second = bench.store.get(&id("cart")).await.unwrap();
    assert!(second.not_after() > first.not_after());
}

/// Behaviour 157.
#[tokio::test(start_paused = true)]
async fn an_outage_keeps_the_old_certificate_until_it_expires() {
    let bench = bench(1, params());
    let first = bench.store.get(&id("cart")).await.unwrap();
    bench.weather(true);
    advance(TTL.mul_f64(0.9)).await;
    settle().await;
    assert!(Arc::ptr_eq(
        &first,
        &bench.store.get(&id("cart")).await.unwrap()
    ));
    assert!(bench.asked() >= 2, "renewal was tried");
    advance(TTL.mul_f64(0.2)).await;
    settle().await;
    let error = bench.store.get(&id("cart")).await.unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    bench.weather(false);
    advance(Duration::from_secs(2)).await;
    let second = bench.store.get(&id("cart")).await.unwrap();
    assert!(second.not_after() > first.not_after());
}

#[tokio::test(start_paused = true)]
async fn attempts_of_an_outage_are_spaced_out() {
    let bench = bench(1, params());
    bench.weather(true);
    bench.store.get(&id("cart")).await.unwrap_err();
    for _ in 0..3600 {
        advance(Duration::from_secs(1)).await;
        settle().await;
    }
    // 1, 2, 4 … 128 seconds, then 150 each: about 30 in the hour.
    let asked = bench.asked();
    assert!((25..45).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn a_fresh_failure_is_answered_at_once_and_an_old_one_is_tried_again() {
    let bench = bench(1, params());
    bench.weather(true);
    for _ in 0..10 {
        bench.store.get(&id("cart")).await.unwrap_err();
    }
    assert_eq!(bench.asked(), 1);
    bench.weather(false);
    advance(Duration::from_secs(1)).await;
    bench.store.get(&id("cart")).await.unwrap();
    assert_eq!(bench.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_does_not_answer_is_given_up() {
    let bench = bench(0, params());
    let start = Instant::now();
    let error = bench.store.get(&id("cart")).await.unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    assert_eq!(start.elapsed(), Params::default().issue_timeout);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_is_expired_on_arrival_is_refused() {
    let bench = bench(
        1,
        Params {
            ttl: Duration::ZERO,
            ..Params::default()
        },
    );
    let error = bench.store.get(&id("cart")).await.unwrap_err();
    assert!(matches!(error, Error::Expired(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn forgetting_ends_waiting_and_renewal() {
    let bench = bench(0, params());
    let store = Arc::clone(&bench.store);
    let waiter = tokio::spawn(async move { store.get(&id("cart")).await });
    settle().await;
    bench.store.forget(&id("cart"));
    let error = waiter.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Forgotten(_)), "{error}");
    bench.fake.open.add_permits(1);
    advance(TTL * 10).await;
    settle().await;
    assert_eq!(bench.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_run_ends_waiting() {
    let bench = bench(0, params());
    let store = Arc::clone(&bench.store);
    let waiter = tokio::spawn(async move { store.get(&id("cart")).await });
    settle().await;
    bench.run.abort();
    let error = waiter.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Forgotten(_)), "{error}");
    bench.store.prefetch(&id("other"));
    assert!(bench.store.get(&id("other")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn who_is_waited_for_goes_before_who_is_only_expected() {
    let bench = bench(
        0,
        Params {
            concurrency: 1,
            ..params()
        },
    );
    for early in ["first", "second", "third"] {
        bench.store.prefetch(&id(early));
        settle().await;
    }
    let store = Arc::clone(&bench.store);
    let waiter = tokio::spawn(async move { store.get(&id("wanted")).await });
    settle().await;
    bench.fake.open.add_permits(1);
    waiter.await.unwrap().unwrap();
    settle().await;
    let order: Vec<_> = bench.started.try_iter().collect();
    assert_eq!(order[1], id("wanted"));
    assert_eq!(order.len(), 4);
    bench.store.get(&id("third")).await.unwrap();
    assert_eq!(bench.asked(), 0, "it was there");
}

#[tokio::test(start_paused = true)]
async fn what_a_list_revokes_is_asked_for_anew_and_not_given_out_meanwhile() {
    let (replace, revocations) = Revocations::followed(RevocationLists::default());
    let params = Params {
        rules: Rules {
            revocations,
            ..Rules::default()
        },
        ..params()
    };
    let bench = bench(Semaphore::MAX_PERMITS, params);
    let (revoked, kept) = (id("cart"), id("bank"));
    let first = bench.store.get(&revoked).await.unwrap();
    let other = bench.store.get(&kept).await.unwrap();
    let list = bench.fake.authority.list(&[&first.chain()[0]]);
    bench.asked();

    bench.weather(true);
    replace.send_replace(Arc::new(RevocationLists::parse(&list).unwrap()));
    settle().await;
    assert_eq!(bench.asked(), 1);
    assert!(
        bench.store.get(&revoked).await.is_err(),
        "nothing in its place"
    );
    let unchanged = bench.store.get(&kept).await.unwrap();
    assert!(Arc::ptr_eq(&other, &unchanged));

    bench.weather(false);
    advance(Duration::from_secs(5)).await;
    let second = bench.store.get(&revoked).await.unwrap();
    assert_ne!(first.chain(), second.chain());
}

#[tokio::test(start_paused = true)]
async fn everything_is_asked_for_anew_when_another_signs_and_serves_until_then() {
    let bench = bench(2, params());
    let cart = bench.store.get(&id("cart")).await.unwrap();
    let bank = bench.store.get(&id("bank")).await.unwrap();
    assert_eq!(bench.asked(), 2);
    bench.fake.open.forget_permits(2);
    bench.store.renew_all();
    settle().await;
    assert_eq!(bench.asked(), 2);
    for (name, held) in [("cart", &cart), ("bank", &bank)] {
        assert!(Arc::ptr_eq(
            held,
            &bench.store.get(&id(name)).await.unwrap()
        ));
    }
    bench.fake.open.add_permits(2);
    settle().await;
    for (name, held) in [("cart", &cart), ("bank", &bank)] {
        assert!(!Arc::ptr_eq(
            held,
            &bench.store.get(&id(name)).await.unwrap()
        ));
    }
    assert_eq!(bench.asked(), 0, "and not again");
}

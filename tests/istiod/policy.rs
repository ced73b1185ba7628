//! AuthorizationPolicy with every field that a node judges by, as istiod translates it.

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Heard, Server},
    mesh::{PATIENCE, knock},
};

use crate::{
    asker::QUESTION,
    world::{Plan, World, authorization, poll, timed},
};

/// For each client in turn, whether it reaches ports 9000 and 9001.
type Reach = [bool; 6];

const CLIENTS: [&str; 3] = ["client", "other", "foreign"];
const ALL: Reach = [true; 6];
const NONE: Reach = [false; 6];
const CLIENT: Reach = [true, true, false, false, false, false];
const OTHER: Reach = [false, false, true, true, false, false];
const FOREIGN: Reach = [false, false, false, false, true, true];
const FIRST_PORT: Reach = [true, false, true, false, true, false];

const fn not(reach: Reach) -> Reach {
    let [a, b, c, d, e, f] = reach;
    [!a, !b, !c, !d, !e, !f]
}

/// What the field of a source, of an operation or of a condition lets through, and a neighbour's never equals its own.
const FIELDS: [(&str, &str, Reach); 20] = [
    (
        "principals",
        "from: [{source: {principals: [cluster.local/ns/demo/sa/client]}}]",
        CLIENT,
    ),
    (
        "principals, suffix",
        "from: [{source: {principals: ['*/sa/other']}}]",
        OTHER,
    ),
    (
        "principals, prefix",
        "from: [{source: {principals: ['cluster.local/ns/else*']}}]",
        FOREIGN,
    ),
    (
        "notPrincipals",
        "from: [{source: {notPrincipals: [cluster.local/ns/demo/sa/client]}}]",
        not(CLIENT),
    ),
    (
        "namespaces",
        "from: [{source: {namespaces: [elsewhere]}}]",
        FOREIGN,
    ),
    (
        "notNamespaces",
        "from: [{source: {notNamespaces: [elsewhere]}}]",
        not(FOREIGN),
    ),
    (
        "serviceAccounts",
        "from: [{source: {serviceAccounts: [elsewhere/foreign, other]}}]",
        not(CLIENT),
    ),
    (
        "notServiceAccounts",
        "from: [{source: {notServiceAccounts: [demo/other]}}]",
        not(OTHER),
    ),
    (
        "ipBlocks",
        "from: [{source: {ipBlocks: [CLIENT_IP]}}]",
        CLIENT,
    ),
    (
        "notIpBlocks",
        "from: [{source: {ipBlocks: [10.88.1.0/24], notIpBlocks: [CLIENT_IP]}}]",
        not(CLIENT),
    ),
    ("ports", "to: [{operation: {ports: ['9000']}}]", FIRST_PORT),
    (
        "notPorts",
        "to: [{operation: {notPorts: ['9000']}}]",
        not(FIRST_PORT),
    ),
    (
        "when source.ip",
        "when: [{key: source.ip, values: [CLIENT_IP]}]",
        CLIENT,
    ),
    (
        "when source.namespace",
        "when: [{key: source.namespace, notValues: [demo]}]",
        FOREIGN,
    ),
    (
        "when source.principal",
        "when: [{key: source.principal, values: ['cluster.local/ns/demo/*']}]",
        not(FOREIGN),
    ),
    (
        "when destination.port",
        "when: [{key: destination.port, values: ['9000']}]",
        FIRST_PORT,
    ),
    (
        "when destination.ip, another's",
        "when: [{key: destination.ip, values: [CLIENT_IP]}]",
        NONE,
    ),
    (
        "when destination.ip",
        "when: [{key: destination.ip, values: [SERVER_IP]}]",
        ALL,
    ),
    (
        "all of a rule",
        "from: [{source: {namespaces: [demo]}}], to: [{operation: {ports: ['9000']}}], \
         when: [{key: source.principal, notValues: [cluster.local/ns/demo/sa/other]}]",
        [true, false, false, false, false, false],
    ),
    (
        "an attribute of HTTP: its rule lets nobody in",
        "to: [{operation: {methods: [GET]}}]",
        NONE,
    ),
];

fn start() -> Result<World> {
    Plan::new()
        .pod("client", "a")
        .pod("other", "a")
        .pod("foreign", "a")
        .in_namespace("foreign", "elsewhere")
        .pod("server", "b")
        .start()
}

fn reach(world: &World) -> Result<Reach> {
    let server = world.pod("server")?;
    let mut reach = NONE;
    let both = CLIENTS
        .iter()
        .flat_map(|client| [(client, 9000), (client, 9001)]);
    for (reached, (client, port)) in reach.iter_mut().zip(both) {
        let from = &world.pod(client)?.netns;
        let heard = knock(from, server.at(port), QUESTION, PATIENCE)?;
        *reached = heard == Heard::Answer(QUESTION.to_vec());
    }
    Ok(reach)
}

fn wait_reach(world: &World, what: &str, expected: Reach) -> Result<()> {
    let mut last = None;
    poll(what, || {
        last = reach(world).ok();
        (last == Some(expected)).then_some(())
    })
    .with_context(|| format!("{what}: expected {expected:?}, last {last:?}"))
}

#[test]
fn every_l4_field_of_a_policy_lets_in_and_keeps_out_whom_it_says() -> Result<()> {
    let world = start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let _apps = [
        Server::start(&server.netns, 9000, apps::echo)?,
        Server::start(&server.netns, 9001, apps::echo)?,
    ];
    wait_reach(&world, "no policy", ALL)?;
    let (own, its) = (client.v4.to_string(), server.v4.to_string());
    let write = |action: &str, rule: &str| {
        let rule = rule.replace("CLIENT_IP", &own).replace("SERVER_IP", &its);
        let spec = format!(
            "{{selector: {{matchLabels: {{app: server}}}}, action: {action}, rules: [{{{rule}}}]}}"
        );
        world.cluster.apply(&authorization("it", "demo", &spec))
    };
    // A policy without a rule.
    let mut before = NONE;
    let spec = "{selector: {matchLabels: {app: server}}, action: ALLOW}";
    world.cluster.apply(&authorization("it", "demo", spec))?;
    wait_reach(&world, "an ALLOW of nobody", NONE)?;
    for (what, rule, allowed) in FIELDS {
        ensure!(before != allowed, "{what} would show nothing");
        timed(
            &format!("ALLOW by {what}"),
            || write("ALLOW", rule),
            || wait_reach(&world, what, allowed),
        )?;
        before = allowed;
    }
    // What a DENY names is refused, and the rest is not.
    for (what, rule, matched) in FIELDS
        .into_iter()
        .filter(|(what, ..)| ["principals", "ipBlocks", "notPorts", "namespaces"].contains(what))
    {
        timed(
            &format!("DENY by {what}"),
            || write("DENY", rule),
            || wait_reach(&world, what, not(matched)),
        )?;
    }
    Ok(())
}

#[test]
fn policies_of_the_mesh_and_of_a_namespace_reach_as_far_as_they_say() -> Result<()> {
    let world = start()?;
    let (client, server) = (world.pod("client")?, world.pod("server")?);
    let foreign = world.pod("foreign")?;
    let _apps = [
        Server::start(&server.netns, 9000, apps::echo)?,
        Server::start(&server.netns, 9001, apps::echo)?,
        Server::start(&foreign.netns, 9000, apps::echo)?,
    ];
    let foreign_answers = || -> Result<bool> {
        let heard = knock(&client.netns, foreign.at(9000), QUESTION, PATIENCE)?;
        Ok(heard == Heard::Answer(QUESTION.to_vec()))
    };
    wait_reach(&world, "no policy", ALL)?;
    let deny = "{action: DENY, rules: [{from: [{source: {principals: ['*/sa/client']}}]}]}";
    for (namespace, elsewhere_too) in [("demo", false), ("istio-system", true)] {
        let what = format!("a DENY of namespace {namespace}");
        timed(
            &what,
            || world.cluster.apply(&authorization("wide", namespace, deny)),
            || wait_reach(&world, &what, not(CLIENT)),
        )?;
        poll(&what, || {
            (foreign_answers().ok()? != elsewhere_too).then_some(())
        })?;
        let object = ["-n", namespace, "authorizationpolicy", "wide"];
        world.delete(&format!("without {what}"), &object, || {
            wait_reach(&world, &what, ALL)
        })?;
        poll("everybody", || foreign_answers().ok()?.then_some(()))?;
    }
    ensure!(reach(&world)? == ALL);
    Ok(())
}

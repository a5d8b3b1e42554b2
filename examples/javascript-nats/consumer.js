// A consumer of Orthanc's events on NATS JetStream, complete and without our package: docs/any-language.md says what it
// has to do, rule by rule. Make `handle` your own.
import {EventEmitter, once} from "node:events";
import {readFileSync} from "node:fs";
import {setTimeout as sleep} from "node:timers/promises";
import {connect, headers as newHeaders, nanos} from "@nats-io/transport-node";
import {AckPolicy, DeliverPolicy, DiscardPolicy, jetstream, jetstreamManager, RetentionPolicy} from "@nats-io/jetstream";
import {HTTP} from "cloudevents";

const {BROKER_URL = "nats://127.0.0.1:4222", CONSUMER = "javascript", START = "new", CONFORMANCE = "{}"} = process.env;
const MAX_ATTEMPTS = Number(process.env.MAX_ATTEMPTS ?? 20);
const ACK_WAIT = Number(process.env.ACK_WAIT ?? 30) * 1000; // after so long without a word it is given to another
const [AT_ONCE, DRAIN] = [16, 25000];
const [EVENTS, INBOX, DEAD] = ["ORTHANC_EVENTS", "ORTHANC_EVENTS_INBOX", "ORTHANC_EVENTS_DEAD"];

class Retry extends Error { constructor(seconds) { super("later"); this.seconds = seconds; } }
class Reject extends Error {}

// Your work. It returns: done. It throws Retry: again in so many seconds; Reject: never; anything else: again, and
// behind MAX_ATTEMPTS never. No patient data in the reason of a Reject.
async function handle(event, attempt) {
  console.log(JSON.stringify({did: "begin", attempt, event}));
  try { // what `orthanc-events conformance` tells it to do: leave it out
    const told = JSON.parse(CONFORMANCE)[event.subject];
    if (told === "retry" && attempt === 1) throw new Retry(1);
    if (told === "later") throw new Retry(3600);
    if (told === "reject") throw new Reject("told to");
    if (told === "fail") throw new Error(`never said, it can have patient data: ${JSON.stringify(event.data)}`);
    if (told === "slow") await sleep(2000);
    if (told === "hang") await sleep(2 ** 30);
  } finally {
    console.log(JSON.stringify({did: "end", id: event.id}));
  }
}

function decode(headers, body) {
  for (const name of Object.keys(headers).filter((one) => one.startsWith("ce-"))) {
    headers[name] = decodeURIComponent(headers[name]); // NATS' binding escapes what is not plain ASCII
  }
  const event = HTTP.toEvent({headers, body});
  event.validate();
  return event;
}

const lowered = (pairs) => Object.fromEntries([...pairs].map(([name, value]) => [name.toLowerCase(), [value].flat()[0]]));

if (process.argv[2] === "--decode") { // golden vectors
  for (const {headers, body} of JSON.parse(readFileSync(process.argv[3], "utf8"))) {
    console.log(JSON.stringify(decode(lowered(Object.entries(headers)), body)));
  }
  process.exit(0);
}

const connection = await connect({servers: BROKER_URL, maxReconnectAttempts: -1, waitOnFirstConnect: true});
const manager = await jetstreamManager(connection);
const stream = jetstream(connection);
const underWay = new Set();
const ended = new EventEmitter(); // says "one" when one has
const tails = new Map(); // the last of each key that is under way: those of one key are handled one by one
let stopping = false;

// Into the inbox, to be given again, or among the dead letters: the same bytes and headers, and what is to be said.
// It is there when this returns; a second copy of the same message is dropped.
async function copy(where, message, given, said) {
  const headers = newHeaders();
  for (const [name, value] of Object.entries(given)) {
    if (!["nats-msg-id", "orthanc-due"].includes(name)) headers.set(name, value);
  }
  const id = given["orthanc-event-id"] ?? given["nats-msg-id"] ?? "";
  const all = {...said, "orthanc-event-id": id, "orthanc-consumer": CONSUMER,
    "orthanc-address": given["orthanc-address"] ?? message.subject,
    "Nats-Msg-Id": `${id}:${where}:${CONSUMER}:${message.info.stream}.${message.seq}.${message.timestampNanos}`};
  for (const [name, value] of Object.entries(all)) if (value !== "") headers.set(name, value.replace(/[^ -~]/g, "?"));
  const subject = where === "retry" ? `orthanc.inbox.${CONSUMER}` : `orthanc.dead.${CONSUMER}`;
  await stream.publish(subject, message.data, {headers});
}

const late = (held) => Date.now() - held.since > 0.8 * ACK_WAIT;

async function settle(message, held) {
  const given = lowered(message.headers ?? []);
  const due = Date.parse(given["orthanc-due"] ?? "1970-01-01") - Date.now();
  if (stopping) return message.nak(); // not begun: it is for others
  if (due > 0) return message.nak(due + 250);
  const before = given["orthanc-consumer"] === CONSUMER ? Number(given["orthanc-attempts"] ?? 0) : 0;
  const died = Math.max(0, message.info.deliveryCount - (given["orthanc-due"] ? 2 : 1)); // with it in hand
  const attempt = before + died + 1;
  let failure, event;
  try {
    event = decode({...given}, message.string());
  } catch {
    failure = new Reject("it is no CloudEvent");
  }
  try {
    if (event) await handle(event, attempt);
  } catch (error) { // whatever was thrown
    failure = error instanceof Error ? error : new Error();
  }
  if (late(held)) return;
  if (failure) {
    const now = new Date().toISOString();
    const said = {"orthanc-attempts": String(attempt), "orthanc-last-failure": now,
      "orthanc-first-failure": given["orthanc-first-failure"] ?? now};
    if (!(failure instanceof Retry || failure instanceof Reject)) said["orthanc-exception"] = failure.name;
    const dead = failure instanceof Reject || attempt >= MAX_ATTEMPTS;
    if (dead) {
      said["orthanc-reason"] = failure instanceof Reject ? failure.message : `failed ${attempt} times of ${MAX_ATTEMPTS}`;
    } else {
      const wait = failure.seconds ?? Math.min(900, 2 ** (attempt - 1));
      said["orthanc-operation"] = "retry";
      said["orthanc-due"] = new Date(Date.now() + wait * 1000).toISOString();
    }
    await copy(dead ? "dead" : "retry", message, given, said);
  }
  message.ack();
}

function take(message, mine) {
  const held = {since: Date.now()};
  const beat = setInterval(() => {
    if (late(held)) return; // we were frozen: another may have it by now
    message.working();
    held.since = Date.now();
  }, ACK_WAIT / 3);
  const subject = message.headers?.get("orthanc-address") || message.subject;
  const key = subject.split(".").at(-1); // its partition, which all events of a study share
  const work = (tails.get(key) ?? Promise.resolve())
    .then(() => settle(message, held))
    .catch((error) => console.error(`not settled, it comes again: ${error.name}`)) // the broker is away, or full
    .finally(() => {
      clearInterval(beat);
      underWay.delete(work);
      mine.delete(work);
      ended.emit("one");
      if (tails.get(key) === work) tails.delete(key);
    });
  tails.set(key, work);
  underWay.add(work);
  mine.add(work);
}

// The inbox does not wait for the events.
async function receive(name) {
  const mine = new Set();
  let consumer;
  while (!stopping) {
    try {
      consumer ??= await stream.consumers.get(name, CONSUMER);
      while (mine.size >= AT_ONCE) await once(ended, "one"); // never asked for more than can be begun
      const batch = await consumer.fetch({max_messages: AT_ONCE - mine.size, expires: 1000});
      for await (const message of batch) take(message, mine);
    } catch (error) {
      console.error(`nothing is received from ${name}: ${error.name}`);
      await sleep(1000);
    }
  }
}

async function ensure(found, make) {
  try { return await found(); } catch (error) { if (error.name !== "StreamNotFoundError" && error.code !== 10014) throw error; }
  return await make();
}

function giveUp(why) {
  console.error(why);
  process.exit(1);
}

const {config} = await manager.streams.info(EVENTS)
  .catch((error) => giveUp(`NATS has no stream ${EVENTS}: start the bridge first (${error.name})`));
if (await ensure(() => manager.consumers.info(EVENTS, `${CONSUMER}-00`), () => null)) {
  giveUp(`the consumer ${CONSUMER} is an ordered one of another program: take another name`);
}
const beside = (name, subject, more) => ensure(() => manager.streams.info(name), () => manager.streams.add({
  name, subjects: [`${subject}.*`], discard: DiscardPolicy.New, storage: config.storage, max_bytes: 2 ** 30,
  num_replicas: config.num_replicas, duplicate_window: config.duplicate_window, ...more}));
await beside(INBOX, "orthanc.inbox", {retention: RetentionPolicy.Workqueue, max_age: config.max_age});
await beside(DEAD, "orthanc.dead", {});
for (const [name, filter_subject] of [[INBOX, `orthanc.inbox.${CONSUMER}`], [EVENTS, "orthanc.events.>"]]) {
  await ensure(() => manager.consumers.info(name, CONSUMER), () => manager.consumers.add(name, {
    durable_name: CONSUMER, filter_subject, ack_policy: AckPolicy.Explicit, ack_wait: nanos(ACK_WAIT), max_deliver: -1,
    max_ack_pending: -1, deliver_policy: name === INBOX || START === "oldest" ? DeliverPolicy.All : DeliverPolicy.New}));
}
for (const signal of ["SIGTERM", "SIGINT"]) {
  process.once(signal, () => {
    stopping = true;
    setTimeout(() => process.exit(1), DRAIN).unref(); // what has not ended by then comes again
  });
}
console.log(JSON.stringify({did: "ready"}));
await Promise.all([receive(EVENTS), receive(INBOX)]);
await Promise.all(underWay);
await connection.drain(); // what was settled is there before we go

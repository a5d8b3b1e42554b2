// A consumer of Orthanc's events on RabbitMQ, complete and without our package: docs/any-language.md says what it has to
// do, rule by rule. Make `handle` your own.

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.AMQP.BasicProperties;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.DefaultConsumer;
import com.rabbitmq.client.Delivery;
import com.rabbitmq.client.Envelope;
import com.rabbitmq.client.ShutdownSignalException;
import io.cloudevents.CloudEvent;
import io.cloudevents.SpecVersion;
import io.cloudevents.core.data.BytesCloudEventData;
import io.cloudevents.core.message.impl.BaseGenericBinaryMessageReaderImpl;
import io.cloudevents.core.message.impl.GenericStructuredMessageReader;
import io.cloudevents.core.message.impl.MessageUtils;
import io.cloudevents.jackson.JsonFormat;
import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.time.format.DateTimeParseException;
import java.time.temporal.ChronoUnit;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.concurrent.atomic.AtomicLong;
import java.util.function.BiConsumer;

public class Consumer {
    static final String NAME = env("CONSUMER", "java");
    static final int MAX_ATTEMPTS = Integer.parseInt(env("MAX_ATTEMPTS", "20"));
    static final String EVENTS = "orthanc.events", HISTORY = "orthanc.events.history"; // the bridge makes them
    static final String LIVE = "orthanc.consumer." + NAME, INBOX = "orthanc.inbox." + NAME, DEAD = "orthanc.dead." + NAME;
    static final int[] STEPS = {1, 5, 30, 120, 600, 3600}; // seconds that a retry waits in each queue of delays
    static final int AT_ONCE = 16, DRAIN = 25;
    static final ObjectMapper JSON = new ObjectMapper();

    static class Retry extends Exception {
        final int seconds;
        Retry(int seconds) { this.seconds = seconds; }
    }

    static class Reject extends Exception {
        Reject(String reason) { super(reason); }
    }

    // Your work. It returns: done. It throws Retry: again in so many seconds; Reject: never; anything else: again, and
    // behind MAX_ATTEMPTS never. No patient data in the reason of a Reject.
    static void handle(CloudEvent event, int attempt) throws Exception {
        JsonNode plain = JSON.readTree(new JsonFormat().serialize(event));
        say(Map.of("did", "begin", "attempt", attempt, "event", plain));
        try { // what `orthanc-events conformance` tells it to do: leave it out
            String told = JSON.readTree(env("CONFORMANCE", "{}")).path(String.valueOf(event.getSubject())).asText();
            if (told.equals("retry") && attempt == 1) throw new Retry(1);
            if (told.equals("later")) throw new Retry(3600);
            if (told.equals("reject")) throw new Reject("told to");
            if (told.equals("fail")) throw new IllegalStateException("never said, it can have patient data: " + plain);
            if (told.equals("slow")) Thread.sleep(2000);
            if (told.equals("hang")) Thread.sleep(Long.MAX_VALUE);
        } finally {
            say(Map.of("did", "end", "id", event.getId()));
        }
    }

    static CloudEvent decode(Map<String, String> headers, String contentType, byte[] body) {
        return MessageUtils.parseStructuredOrBinaryMessage(
            () -> contentType,
            format -> new GenericStructuredMessageReader(format, body),
            () -> headers.get("ce-specversion"),
            version -> new BinaryReader(version, headers, contentType, body)).toEvent();
    }

    static class BinaryReader extends BaseGenericBinaryMessageReaderImpl<String, String> {
        private final Map<String, String> headers;

        BinaryReader(SpecVersion version, Map<String, String> headers, String contentType, byte[] body) {
            super(version, BytesCloudEventData.wrap(body));
            this.headers = new HashMap<>(headers);
            this.headers.put("content-type", contentType);
        }

        protected boolean isContentTypeHeader(String name) { return name.equals("content-type"); }
        protected boolean isCloudEventsHeader(String name) { return name.startsWith("ce-"); }
        protected String toCloudEventsKey(String name) { return name.substring(3); }
        protected String toCloudEventsValue(String value) { return value; }
        protected void forEachHeader(BiConsumer<String, String> visit) { headers.forEach(visit); }
    }

    final Connection receiving, sending; // two: while RabbitMQ is short of memory it reads nothing from the second
    final Channel channel, copies;
    final ExecutorService threads = Executors.newCachedThreadPool();
    final Map<String, CompletableFuture<Void>> tails = new HashMap<>(); // of each key, one behind the other
    final List<String> tags = new ArrayList<>();
    volatile boolean stopping, returned;

    Consumer(String url) throws Exception {
        ConnectionFactory factory = new ConnectionFactory();
        factory.setUri(url);
        receiving = factory.newConnection();
        sending = factory.newConnection();
        channel = receiving.createChannel();
        copies = sending.createChannel();
        copies.confirmSelect();
        copies.addReturnListener(one -> returned = true);
        if (exists(LIVE + ".63")) throw new IOException("the consumer " + NAME + " is an ordered one of another program: take another name");
        Map<String, Object> quorum = Map.of("x-queue-type", "quorum", "x-delivery-limit", 1_000_000_000);
        Map<String, Object> lasting = with(quorum, Map.of("x-consumer-timeout", 86_400_000));
        channel.queueDeclare(INBOX, true, false, false, lasting);
        for (int step : STEPS) {
            channel.queueDeclare(delay(step), true, false, false, with(quorum, Map.of(
                "x-dead-letter-exchange", "", "x-dead-letter-routing-key", INBOX, "x-message-ttl", step * 1000,
                "x-dead-letter-strategy", "at-least-once", "x-overflow", "reject-publish")));
        }
        Map<String, Object> full = Map.of("x-overflow", "reject-publish", "x-max-length", 50_000);
        channel.queueDeclare(DEAD, true, false, false, with(quorum, full));
        if (env("START", "new").equals("oldest") && !exists(LIVE)) copyHistory();
        channel.queueDeclare(LIVE, true, false, false, lasting); // as soon as it is there, the name is not new any more
        channel.queueBind(LIVE, EVENTS, "#");
        channel.queueUnbind(INBOX, EVENTS, "#"); // it was bound as long as there was history to be copied
        channel.basicQos(AT_ONCE, false);
        for (String queue : new String[] {LIVE, INBOX}) {
            tags.add(channel.basicConsume(queue, false, (tag, delivery) -> take(delivery), tag -> Runtime.getRuntime().halt(1)));
        }
        receiving.addShutdownListener(why -> { if (!stopping) Runtime.getRuntime().halt(1); }); // start it again
        sending.addShutdownListener(why -> { if (!stopping) Runtime.getRuntime().halt(1); });
    }

    boolean exists(String queue) throws IOException, TimeoutException {
        try (Channel asking = receiving.createChannel()) {
            asking.queueDeclarePassive(queue);
            return true;
        } catch (IOException error) { // one that is there may be away, or not for us
            boolean missing = error.getCause() instanceof ShutdownSignalException end
                && end.getReason() instanceof AMQP.Channel.Close close && close.getReplyText().contains("no queue '");
            if (!missing) throw error;
            return false;
        }
    }

    // What was sent before the first start goes into the inbox, and what is sent meanwhile too. Whoever dies before LIVE is
    // there begins again: then some come twice.
    void copyHistory() throws Exception {
        channel.queueBind(INBOX, EVENTS, "#");
        AtomicLong last = new AtomicLong(-1);
        CountDownLatch some = new CountDownLatch(1), all = new CountDownLatch(1);
        try (Channel end = receiving.createChannel()) {
            end.basicQos(10_000); // more than is stored together: all of the end is given before the next question's answer
            String tag = end.basicConsume(HISTORY, false, Map.of("x-stream-offset", "last"), new DefaultConsumer(end) {
                @Override public void handleDelivery(String tag, Envelope envelope, BasicProperties properties, byte[] body) {
                    last.set(offset(properties));
                    some.countDown();
                }
                @Override public void handleCancelOk(String tag) { all.countDown(); }
            });
            boolean empty = !some.await(10, TimeUnit.SECONDS);
            if (end.queueDeclarePassive(HISTORY).getMessageCount() > 0 && empty) throw new IOException(HISTORY + " gives nothing");
            end.basicCancel(tag);
            all.await();
        }
        BlockingQueue<Delivery> came = new LinkedBlockingQueue<>();
        try (Channel past = receiving.createChannel()) {
            past.basicQos(AT_ONCE);
            past.basicConsume(HISTORY, false, Map.of("x-stream-offset", "first"), (tag, one) -> came.add(one), tag -> {});
            for (long at = -1; at < last.get();) {
                Delivery one = came.take();
                at = offset(one.getProperties());
                copy(INBOX, one, given(one), Map.of("orthanc-address", one.getEnvelope().getRoutingKey()));
                past.basicAck(one.getEnvelope().getDeliveryTag(), false);
            }
        }
    }

    static long offset(BasicProperties properties) { return ((Number) properties.getHeaders().get("x-stream-offset")).longValue(); }

    static Map<String, String> given(Delivery delivery) {
        Map<String, String> given = new TreeMap<>();
        Map<String, Object> headers = delivery.getProperties().getHeaders();
        if (headers != null) headers.forEach((name, value) -> given.put(name.toLowerCase(Locale.ROOT), String.valueOf(value)));
        return given;
    }

    void take(Delivery delivery) {
        Map<String, String> given = given(delivery);
        String address = given.getOrDefault("orthanc-address", delivery.getEnvelope().getRoutingKey());
        String key = address.substring(address.lastIndexOf('.') + 1); // its partition, which a study's events share
        synchronized (tails) {
            CompletableFuture<Void> before = tails.getOrDefault(key, CompletableFuture.completedFuture(null));
            tails.put(key, before.thenRunAsync(() -> settle(delivery, given, address), threads));
        }
    }

    void settle(Delivery delivery, Map<String, String> given, String address) {
        try {
            long left = ChronoUnit.MILLIS.between(Instant.now(), due(given));
            if (left > 0) {
                copy(delay(left / 1000), delivery, given, Map.of("orthanc-due", given.get("orthanc-due")));
            } else if (stopping) { // not begun, so for others: RabbitMQ counts what is given back as if a worker had died
                copy(INBOX, delivery, given, Map.of("orthanc-consumer", NAME, "orthanc-address", address,
                    "orthanc-attempts", String.valueOf(attempt(given) - 1)));
            } else {
                work(delivery, given, address);
            }
            synchronized (channel) { channel.basicAck(delivery.getEnvelope().getDeliveryTag(), false); }
        } catch (Throwable error) { // a place takes nothing, or the connection is gone: what is held comes again
            System.err.println("not settled: " + error.getClass().getName());
            if (!stopping) Runtime.getRuntime().halt(1);
        }
    }

    static int attempt(Map<String, String> given) {
        boolean ours = NAME.equals(given.get("orthanc-consumer"));
        int before = ours ? number(given.get("orthanc-attempts")) : 0;
        int died = number(given.get("x-delivery-count")); // with it in hand
        return before + died + 1;
    }

    // Anybody may have sent it.
    static int number(String text) { return text != null && text.matches("[0-9]{1,9}") ? Integer.parseInt(text) : 0; }

    static Instant due(Map<String, String> given) {
        try {
            return Instant.parse(given.getOrDefault("orthanc-due", ""));
        } catch (DateTimeParseException error) {
            return Instant.EPOCH;
        }
    }

    void work(Delivery delivery, Map<String, String> given, String address) throws Exception {
        int attempt = attempt(given);
        Throwable failure = null;
        CloudEvent event = null;
        try {
            event = decode(given, delivery.getProperties().getContentType(), delivery.getBody());
        } catch (RuntimeException error) {
            failure = new Reject("it is no CloudEvent");
        }
        try {
            if (event != null) handle(event, attempt);
        } catch (Throwable error) {
            failure = error;
        }
        if (failure == null) return;
        String now = Instant.now().truncatedTo(ChronoUnit.MILLIS).toString();
        Map<String, String> said = new HashMap<>(Map.of("orthanc-consumer", NAME, "orthanc-address", address,
            "orthanc-attempts", String.valueOf(attempt), "orthanc-last-failure", now,
            "orthanc-first-failure", given.getOrDefault("orthanc-first-failure", now)));
        boolean own = failure instanceof Retry || failure instanceof Reject;
        if (!own) said.put("orthanc-exception", failure.getClass().getName()); // its type alone
        if (failure instanceof Reject || attempt >= MAX_ATTEMPTS) {
            String over = "failed " + attempt + " times of " + MAX_ATTEMPTS;
            said.put("orthanc-reason", failure instanceof Reject ? failure.getMessage() : over);
            copy(DEAD, delivery, given, said);
        } else {
            long wait = failure instanceof Retry again ? again.seconds : Math.min(900, 1L << Math.min(attempt - 1, 30));
            said.put("orthanc-operation", "retry");
            said.put("orthanc-due", Instant.now().plusSeconds(wait).truncatedTo(ChronoUnit.MILLIS).plusMillis(1).toString());
            copy(delay(wait), delivery, given, said);
        }
    }

    // The same bytes and headers, and what is to be said. The queue has it, on disk, when this returns.
    void copy(String queue, Delivery delivery, Map<String, String> given, Map<String, String> said) throws Exception {
        Map<String, Object> headers = new HashMap<>(given);
        headers.keySet().removeIf(name -> name.startsWith("x-") || name.equals("orthanc-due")); // RabbitMQ's own
        said.forEach((name, value) -> headers.put(name, String.valueOf(value).replaceAll("[^ -~]", "?")));
        BasicProperties properties = new BasicProperties.Builder().contentType(delivery.getProperties().getContentType())
            .deliveryMode(2).messageId(UUID.randomUUID().toString()).headers(headers).build();
        while (!confirmed(queue, properties, delivery.getBody())) Thread.sleep(1000); // it is full: the original is kept
    }

    boolean confirmed(String queue, BasicProperties properties, byte[] body) throws Exception {
        synchronized (copies) {
            returned = false;
            copies.basicPublish("", queue, true, properties, body);
            boolean taken = copies.waitForConfirms(10_000);
            if (returned) throw new IOException("there is no queue " + queue);
            return taken;
        }
    }

    void stop() {
        stopping = true; // nothing is begun any more
        try {
            synchronized (channel) { for (String tag : tags) channel.basicCancel(tag); }
            CompletableFuture<?>[] all;
            synchronized (tails) { all = tails.values().toArray(new CompletableFuture<?>[0]); }
            CompletableFuture.allOf(all).get(DRAIN, TimeUnit.SECONDS);
            receiving.close(); // what was settled is there before we go
            Runtime.getRuntime().halt(0);
        } catch (Exception error) {
            Runtime.getRuntime().halt(1); // what has not ended comes again
        }
    }

    static String delay(long seconds) {
        int step = STEPS[0];
        for (int one : STEPS) if (one <= seconds) step = one;
        return "orthanc.retry." + NAME + "." + step;
    }

    static Map<String, Object> with(Map<String, Object> some, Map<String, Object> more) {
        Map<String, Object> all = new HashMap<>(some);
        all.putAll(more);
        return all;
    }

    static String env(String name, String otherwise) {
        String value = System.getenv(name);
        return value == null || value.isEmpty() ? otherwise : value;
    }

    static synchronized void say(Object line) throws IOException {
        System.out.println(JSON.writeValueAsString(line));
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments.length > 1 && arguments[0].equals("--decode")) { // golden vectors
            for (JsonNode one : JSON.readTree(new File(arguments[1]))) {
                Map<String, String> headers = new HashMap<>();
                one.get("headers").properties().forEach(pair -> headers.put(pair.getKey(), pair.getValue().asText()));
                String contentType = one.at("/properties/content_type").asText();
                byte[] body = one.get("body").asText().getBytes(StandardCharsets.UTF_8);
                say(JSON.readTree(new JsonFormat().serialize(decode(headers, contentType, body))));
            }
            return;
        }
        Consumer consumer;
        try {
            consumer = new Consumer(env("BROKER_URL", "amqp://127.0.0.1:5672"));
        } catch (Exception error) { // RabbitMQ's own word is in the cause
            System.err.println("it can't begin: " + (error.getCause() == null ? error : error.getCause()).getMessage());
            Runtime.getRuntime().halt(1); // the connection's threads would keep it
            return;
        }
        Runtime.getRuntime().addShutdownHook(new Thread(consumer::stop));
        say(Map.of("did", "ready"));
    }
}
